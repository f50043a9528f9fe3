"""What a run needs in memory, on the terminal."""

from rich.table import Table

from fasc.planning.requirements import Requirements
from fasc.statistics.accumulators import FLUSH_TOKENS


def requirements_table(found: Requirements) -> Table:
    """A row per stage, in GB, and whether it fits."""
    names = list(dict.fromkeys(name for one in found.stages for name in one.parts))
    table = Table(title=f"memory in GB, and whether {found.limit / 1e9:,.4g} GB hold it", title_justify="left")
    for title in ("stage", *names, "total", "fits"):
        table.add_column(title, justify="left" if title == "stage" else "right")
    for one in found.stages:
        parts = [f"{one.parts[name] / 1e9:,.1f}" if name in one.parts else "–" for name in names]
        table.add_row(one.stage, *parts, f"{one.total / 1e9:,.1f}", "yes" if one.total <= found.limit else "no")
    return table


def passes_line(found: Requirements) -> str:
    """How to measure within the limit."""
    if found.passes is None:
        return f"collect does not fit in any number of passes: {found.why}"
    several = "1 pass" if found.passes == 1 else f"{found.passes} passes"
    return (
        f"With {found.limit / 1e9:.4g} GB, `fasc collect --max-memory {found.limit / 1e9:.4g}GB` reads the text in {several} "
        f"(reckoned for {FLUSH_TOKENS:,} tokens or more)."
    )
