"""The paper's figures, drawn from what its recipes left."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from fasc.reporting.dependence_figures import dependence_figures
from fasc.reporting.drawing import save_png
from fasc.reporting.paper_results import MISSING, Results

_COLOURS = {"svd": "#d1495b", "fasc": "#1f6fb4"}


def paper_figures(results: Results, folder: Path) -> dict[str, Path]:
    """Draw Figures 2 to 5, those whose results are there.

    Args:
        results: of the recipes.
        folder: made if it does not exist.

    Returns:
        Title ↦ file.
    """
    found: dict[str, Path] = {}
    with suppress(*MISSING):
        figure = _sensitivity(results.sensitivity())
        found["Figure 2: one block at a time, half rank"] = save_png(figure, folder / "sensitivity.png")
    with suppress(*MISSING):
        titles = ("Figure 3: ρ of every group", "Figure 5: angles between the subspaces of fasc and svd")
        found |= dict(zip(titles, dependence_figures(*results.diagnosed(), folder), strict=False))
    with suppress(*MISSING):
        figure = _gains(results)
        found["Figure 4: ρ, and the ratio of ½J, against the gain of each group"] = save_png(figure, folder / "gains.png")
    return found


def _sensitivity(blocks: Mapping[int, Mapping[str, Mapping[str, Any]]]) -> Figure:
    """Facts and KL by block."""
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 4.6), layout="constrained", dpi=160)
        facts, kl = figure.subplots(2, 1, sharex=True)
        for method, colour in _COLOURS.items():
            rows = [row[method] for row in blocks.values()]
            mean = [row["log_probability"] for row in rows]
            facts.plot(list(blocks), mean, color=colour, label=method)
            low, high = ([row["interval"][end] for row in rows] for end in (0, 1))
            if not any(value is None for value in (*low, *high)):
                facts.fill_between(list(blocks), low, high, color=colour, alpha=0.2, linewidth=0)
            kl.plot(list(blocks), [row["kl"] for row in rows], color=colour, label=method)
        facts.axhline(0, color="#888888", linewidth=0.8)
        facts.set_ylabel("right answer:\nΔ log-probability, nats")
        facts.legend(frameon=False)
        kl.set(xlabel="block that is compressed", ylabel="KL, nats per token", yscale="log")
    return figure


def _gains(results: Results) -> Figure:
    """The logarithm of KL of svd ÷ KL of fasc, a point for each group."""
    rows = results.gains()
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained", dpi=160)
        axes = figure.subplots(1, 2, sharey=True)
        for axis, key, label in ((axes[0], "rho", "ρ"), (axes[1], "half_j", "log(½J of svd ÷ ½J of fasc)")):
            axis.scatter([row[key] for row in rows], [row["gain"] for row in rows], s=9, alpha=0.7, color="#444444")
            axis.axhline(0, color="#888888", linewidth=0.8)
            axis.set_xlabel(f"{label}; r = {results.correlation(key)['r']:.2f}")
        axes[0].set_ylabel("log(KL of svd ÷ KL of fasc)")
    return figure
