"""The figure of a run: what each model kept, at a glance."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fasc.reporting.drawing import save_png
from fasc.reporting.entries import DENSE, Entry, benchmarks_of
from fasc.reporting.headline import headline
from fasc.reporting.table import base_name

_DENSE_COLOUR = "#8a8f98"
_COLOURS = ("#d1495b", "#1f6fb4", "#2d8a4e", "#8451a8", "#b8860b", "#37878a")
_TITLES = {"perplexity": "perplexity", "kl": "KL divergence to dense, nats"}
_FEW = 6
"""So many models have their losses by block beside the scores; with more the figure is bars alone."""


def summary_figure(entries: Sequence[Entry], diagnosis: Mapping[str, Any] | None, path: Path) -> Path:
    """A panel for every benchmark, for size and for speed; a bar for every model, with its interval and its value.

    Args:
        entries: the models of a run.
        diagnosis: content of ``diagnosis.json``, if there is one, for the forecast loss by block.
        path: the PNG to write.
    """
    names = [entry.name for entry in entries]
    panels = [*_score_panels(entries), *_size_panels(entries)]
    fisher = _forecast_method(diagnosis) if len(entries) > _FEW else None
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        height = 0.34 * len(names) + 1.5
        figure = Figure(figsize=(2.35 * len(panels) + 1.4, height + (2.6 if fisher else 0)), layout="constrained", dpi=160)
        top, *rest = figure.subfigures(2 if fisher else 1, 1, squeeze=False, height_ratios=[height, 2.6] if fisher else None)[
            :, 0
        ]
        axes = top.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axis, panel in zip(axes, panels, strict=True):
            _bars(axis, names, *panel)
        figure.suptitle(headline(entries), fontsize=11, fontweight="bold")
        if fisher is not None and diagnosis is not None:
            _losses(rest[0].subplots(), diagnosis["groups"], fisher, diagnosis["meta"]["rank_fraction"])
        return save_png(figure, path)


Panel = tuple[str, list[tuple[float, float, float] | None], str]
"""Title; value, lower and upper bound of each model; format of the value."""


def _bytes_of(entry: Entry, dense: int) -> int:
    return entry.plan["totals"]["bytes"] if entry.plan else dense if entry.rival is None else entry.rival.bytes


def _score_panels(entries: Sequence[Entry]) -> list[Panel]:
    panels: list[Panel] = []
    for benchmark in benchmarks_of(entries):
        scores = [entry.score(benchmark) for entry in entries]
        share = all(score is None or score["metric"].startswith("accuracy") for score in scores)
        scale = 100.0 if share else 1.0
        values = [None if score is None else _scaled(score, scale) for score in scores]
        name = base_name(benchmark)
        corpus = benchmark[len(name) :].lstrip("@ ")
        words = _TITLES.get(name, name) + (f"\non {corpus}" if corpus else "")
        better = "more is better" if share else "less is better"
        panels.append((f"{words}{', % right' if share else ''}\n({better})", values, "{:,.1f}" if share else "{:,.3g}"))
    return panels


def _scaled(score: Mapping[str, Any], scale: float) -> tuple[float, float, float]:
    value = scale * score["value"]
    bounds = [value if score[key] is None else scale * score[key] for key in ("low", "high")]
    return value, bounds[0], bounds[1]


def _size_panels(entries: Sequence[Entry]) -> list[Panel]:
    dense = next((entry.plan["totals"]["dense_bytes"] for entry in entries if entry.plan), None)
    if dense is None:
        return []
    sizes = [_bytes_of(entry, dense) / 1e6 for entry in entries]
    panels: list[Panel] = [("weights, MB\n(less is better)", [(size, size, size) for size in sizes], "{:,.0f}")]
    speeds = [entry.speed("decode") for entry in entries]
    if any(speeds):
        ratios = [(1.0, 1.0, 1.0) if entry.name == DENSE else speed for entry, speed in zip(entries, speeds, strict=True)]
        panels.append(("decoding speed, × dense\n(more is better)", list(ratios), "{:,.2f}"))
    return panels


def _forecast_method(diagnosis: Mapping[str, Any] | None) -> str | None:
    if not diagnosis or not diagnosis["groups"]:
        return None
    methods = diagnosis["groups"][0]["methods"]
    return next((name for name, values in methods.items() if "predicted_loss" in values), None)


def _bars(axis: Axes, names: Sequence[str], title: str, values: Sequence[tuple[float, float, float] | None], form: str) -> None:
    """Horizontal bars, the dense model first, so that names of any length can be read."""
    compressed = [name for name in names if name != DENSE]
    known = [value for value in values if value is not None]
    log = len(known) > 1 and max(v[0] for v in known) > 20 * min(v[0] for v in known) > 0
    for row, (name, value) in enumerate(zip(names, values, strict=True)):
        if value is None:
            continue
        colour = _DENSE_COLOUR if name == DENSE else _COLOURS[compressed.index(name) % len(_COLOURS)]
        centre, low, high = value
        axis.barh(row, centre, color=colour, height=0.7)
        axis.errorbar(
            centre, row, xerr=[[max(0, centre - low)], [max(0, high - centre)]], color="#333333", capsize=2, linewidth=0.9
        )
        axis.annotate(form.format(centre), (high, row), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    if log:
        axis.set_xscale("log")
    axis.set_title(title, fontsize=8.5)
    axis.margins(x=0.28)
    axis.tick_params(axis="x", labelsize=7)
    axis.tick_params(axis="y", length=0)


def _losses(axis: Axes, rows: Sequence[Mapping[str, Any]], method: str, rank_fraction: float) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for index, kind in enumerate(kinds):
        points = [(row["block"], row["methods"][method].get("predicted_loss")) for row in rows if row["kind"] == kind]
        known = [(block, loss) for block, loss in points if loss is not None and loss > 0]
        if known:
            blocks, losses = zip(*known, strict=True)
            colour = _COLOURS[index % len(_COLOURS)]
            axis.plot(blocks, losses, marker="o", markersize=3, linewidth=1.3, label=kind, color=colour)
    axis.set_yscale("log")
    axis.set_xlabel("block")
    axis.set_title(
        f"forecast loss of each group alone, ½J in nats/token ({method} at rank fraction {rank_fraction:g})", fontsize=9
    )
    axis.legend(fontsize=7, frameon=False)
