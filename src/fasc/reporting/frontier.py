"""The frontier of bytes against forecast loss, as a table and a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from fasc.planning.frontier import WAYS, Point, verdict
from fasc.planning.table import composition
from fasc.reporting.drawing import save_png

_TITLES = {"width": "fewer weights", "bits": "fewer bits", "both": "both"}
_COLOURS = {"width": "#8a8f98", "bits": "#1f6fb4", "both": "#d1495b"}


def frontier_table(points: Sequence[Point]) -> Table:
    """A row for every budget: the forecasts, and what the better buy is made of."""
    table = Table(title="forecast loss by size, ½J in nats per token", title_justify="left", box=box.SIMPLE_HEAD)
    for title in ("MB", *(_TITLES[way] for way in WAYS), "multiply-adds"):
        table.add_column(title, justify="right")
    table.add_column("better buy", overflow="fold")
    table.add_column("which is made of", overflow="fold")
    for point in points:
        losses = [point.loss(way) for way in WAYS]
        both = point.plans.get("both")
        table.add_row(
            f"{point.bytes / 1e6:,.1f}",
            *("–" if loss is None else f"{loss:.4f}" for loss in losses),
            "–" if both is None else f"{both.totals['multiply_add_fraction']:.1%}",
            point.sentence(),
            composition(point.plans[point.better_buy]),
        )
    return table


def frontier_figure(points: Sequence[Point], path: Path) -> Path:
    """Bytes and multiply-adds against the forecast loss, a line for each way.

    Args:
        points: the largest budget first.
        path: the PNG to write.
    """
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(8.4, 3.8), layout="constrained", dpi=160)
        left, right = figure.subplots(1, 2, sharey=True)
        for way in WAYS:
            known = [(point, loss) for point in points if (loss := point.loss(way))]
            losses = [loss for _, loss in known]
            how: dict[str, Any] = {"color": _COLOURS[way], "label": _TITLES[way], "marker": "o", "markersize": 3}
            left.plot([point.bytes / 1e6 for point, _ in known], losses, **how)
            right.plot([point.plans[way].totals["multiply_add_fraction"] or 0.0 for point, _ in known], losses, **how)
        left.set(xlabel="MB of weights", ylabel="forecast ½J, nats per token", yscale="log")
        right.set(xlabel="multiply-adds of the compressed layers ÷ dense")
        left.legend(frameon=False)
        figure.suptitle(verdict(points), fontsize=9)
    return save_png(figure, path)
