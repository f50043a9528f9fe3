"""Two models' speed and size on the terminal."""

from rich.table import Table

from fasc.evaluation.speed import SpeedReport
from fasc.reporting.console import print_results


def print_speed(report: SpeedReport) -> None:
    """Every quantity with the ratio and its range over the rounds, then the ideal and the remarks."""
    table = Table()
    for title in ("", "dense", "compressed", "ratio [least, most]"):
        table.add_column(title, justify="right" if title else "left", overflow="fold")
    for one in report.comparisons:
        spread = f" [{one.low:.2f}, {one.high:.2f}]" if one.high > one.low else ""
        table.add_row(one.what, f"{one.dense:,.1f} {one.unit}", f"{one.compressed:,.1f} {one.unit}", f"{one.ratio:.2f} ×{spread}")
    ideal = (
        f"the blocks hold {report.ideal:.2f} × fewer parameters, the most that their saving can bring; a few tokens on a CPU "
        "also gain by factors that all threads read"
    )
    print_results(table, ideal, *report.remarks)
