"""Where ρ is high, and how far the subspaces of two methods lie apart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fasc.reporting.drawing import save_png

THRESHOLD = 0.3
"""The paper's border between low and high ρ."""

Rows = Sequence[Mapping[str, Any]]


def dependence_figures(rows: Rows, compared: Sequence[str] | None, folder: Path) -> list[Path]:
    """Draw ``rho.png`` (block × kind, the paper's Fig. 3) and, where angles are known, ``angles.png`` (Fig. 5).

    Args:
        rows: of a diagnosis.
        compared: the two methods between which the angles are, if any.
        folder: made if it does not exist.

    Returns:
        The files that were written; none if no ρ is known.
    """
    known = [row for row in rows if row["rho"] is not None]
    if not known:
        return []
    paths = [save_png(_heatmap(known), folder / "rho.png")]
    if compared is not None:
        paths.append(save_png(_angles(known, compared), folder / "angles.png"))
    return paths


def _heatmap(rows: Rows) -> Figure:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    blocks = sorted({row["block"] for row in rows if row["block"] is not None})
    panels = (("rho", "ρ (paper Eq. 2)"), ("rho_floor", "ρ₀, sampling noise alone"), ("rho_debiased", "debiased ρ"))
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(0.19 * len(blocks) + 3.4, 4.6), layout="constrained", dpi=160)
        axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        top = max(row["rho"] for row in rows)
        image = None
        for axis, (key, title) in zip(axes, panels, strict=True):
            cells: dict[tuple[int, int], list[float]] = {}
            for row in rows:
                if row["block"] is not None:
                    cells.setdefault((kinds.index(row["kind"]), blocks.index(row["block"])), []).append(row[key])
            grid = np.full((len(kinds), len(blocks)), np.nan)
            for place, values in cells.items():
                grid[place] = np.mean(values)  # of a block's experts
            image = axis.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=top)
            axis.set_yticks(range(len(kinds)), kinds)
            axis.set_title(title, fontsize=9)
        axes[-1].set_xlabel("block")
        axes[-1].set_xticks(range(0, len(blocks), max(1, len(blocks) // 15)), blocks[:: max(1, len(blocks) // 15)])
        if image is not None:
            figure.colorbar(image, ax=list(axes), shrink=0.8)
    return figure


def _angles(rows: Rows, compared: Sequence[str]) -> Figure:
    parts = {
        f"ρ > {THRESHOLD:g}": [row["angle"] for row in rows if row["rho"] > THRESHOLD],
        f"ρ ≤ {THRESHOLD:g}": [row["angle"] for row in rows if row["rho"] <= THRESHOLD],
    }
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2, 3.2), layout="constrained", dpi=160)
        axis = figure.subplots()
        for name, angles in parts.items():
            if angles:
                label = f"{name}: {len(angles)} groups, median {np.median(angles):.0f}°"
                axis.hist(angles, bins=np.linspace(0, 90, 31).tolist(), alpha=0.6, label=label)
        axis.set_xlabel(f"median principal angle between {' and '.join(compared)}, degrees")
        axis.set_ylabel("groups")
        axis.set_ylim(top=1.3 * axis.get_ylim()[1])  # room for the legend
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        axis.legend(frameon=False, loc="upper left")
    return figure
