"""The figure of a run: what was kept, and where the loss lies."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fasc.reporting.entries import DENSE, Entry, benchmarks_of
from fasc.storage import new_file

_DENSE_COLOUR = "#8a8f98"
_COLOURS = ("#c2452d", "#1f6fb4", "#2d8a4e", "#8451a8", "#b8860b", "#37878a")
_AXIS = {"perplexity": "perplexity (lower is better)", "kl": "KL to dense, nats/token (lower is better)"}


def summary_figure(entries: Sequence[Entry], diagnosis: Mapping[str, Any] | None, path: Path) -> Path:
    """Scores of every model with their intervals, and the forecast loss of each kind of layer by block.

    Args:
        entries: the models of a run.
        diagnosis: content of ``diagnosis.json``, if there is one.
        path: the PNG to write.
    """
    benchmarks = benchmarks_of(entries)
    fisher = _forecast_method(diagnosis)
    panels = len(benchmarks) + (fisher is not None)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        wide = max(3.1, 0.34 * len(entries))
        figure = Figure(figsize=(wide * panels + 0.8, 3.6), layout="constrained", dpi=160)
        widths = [1.0] * len(benchmarks) + ([1.6] if fisher else [])
        axes = figure.subplots(1, panels, squeeze=False, width_ratios=widths)[0]
        for axis, benchmark in zip(axes, benchmarks, strict=False):
            _bars(axis, entries, benchmark)
        if fisher is not None and diagnosis is not None:
            _losses(axes[-1], diagnosis["groups"], fisher, diagnosis["meta"]["rank_fraction"])
        with new_file(path) as scratch:
            figure.savefig(scratch, format="png")
    return path


def _forecast_method(diagnosis: Mapping[str, Any] | None) -> str | None:
    if not diagnosis or not diagnosis["groups"]:
        return None
    methods = diagnosis["groups"][0]["methods"]
    return next((name for name, values in methods.items() if "predicted_loss" in values), None)


def _bars(axis: Axes, entries: Sequence[Entry], benchmark: str) -> None:
    shown = [(entry.name, score) for entry in entries if (score := entry.score(benchmark)) is not None]
    accuracy = all(score["metric"].startswith("accuracy") for _, score in shown)
    scale = 100.0 if accuracy else 1.0
    compressed = [name for name, _ in shown if name != DENSE]
    for position, (name, score) in enumerate(shown):
        colour = _DENSE_COLOUR if name == DENSE else _COLOURS[compressed.index(name) % len(_COLOURS)]
        value = scale * score["value"]
        errors = [[value - scale * score["low"]], [scale * score["high"] - value]]
        axis.bar(position, value, color=colour, width=0.68)
        axis.errorbar(position, value, yerr=np.abs(errors), color="#222222", capsize=3, linewidth=1)
        axis.annotate(
            f"{value:,.3g}",
            (position, scale * score["high"]),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axis.set_xticks(range(len(shown)), [name for name, _ in shown], rotation=0 if len(shown) < 4 else 60)
    if not accuracy and max(score["value"] for _, score in shown) > 20 * min(score["value"] for _, score in shown) > 0:
        axis.set_yscale("log")
    name, _, corpus = benchmark.partition("@")
    title = f"{name}: correct, % (higher is better)" if accuracy else _AXIS.get(name, name)
    axis.set_title(f"{title} on {corpus}" if corpus else title, fontsize=9)
    axis.margins(y=0.15)


def _losses(axis: Axes, rows: Sequence[Mapping[str, Any]], method: str, rank_fraction: float) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for index, kind in enumerate(kinds):
        points = [(row["block"], row["methods"][method].get("predicted_loss")) for row in rows if row["kind"] == kind]
        known = [(block, loss) for block, loss in points if loss is not None and loss > 0]
        if known:
            blocks, losses = zip(*known, strict=True)
            axis.plot(
                blocks,
                losses,
                marker="o",
                markersize=3,
                linewidth=1.3,
                label=kind,
                color=_COLOURS[index % len(_COLOURS)],
            )
    axis.set_yscale("log")
    axis.set_xlabel("block")
    axis.set_title(f"forecast loss of each group, ½J in nats/token\n({method} at rank fraction {rank_fraction:g})", fontsize=9)
    axis.legend(fontsize=7, frameon=False)
