"""What a validation found, on the terminal and as a figure."""

from collections.abc import Mapping, Sequence
from math import exp
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.table import Table

from fasc.reporting.compared import difference, share
from fasc.reporting.console import print_results
from fasc.reporting.drawing import save_png

Rows = Sequence[Mapping[str, Any]]


def print_validation(summary: Rows) -> None:
    """A row per forecast, method and rank fraction."""
    table = Table(title="how well forecasts predicted the measured KL divergence", title_justify="left")
    for title in ("forecast", "of", "rank fraction", "n", "Pearson (p)", "Spearman (p)", "median measured ÷ forecast"):
        table.add_column(title, justify="left" if title in ("forecast", "of") else "right", overflow="fold")
    for row in summary:
        fraction = "all" if row["rank_fraction"] is None else f"{row['rank_fraction']:g}"
        scores = ["–", "–"]
        if row["pearson"] is not None:
            scores = [f"{row[key]:.3f} ({row[f'{key}_p']:.1g})" for key in ("pearson", "spearman")]
        ratio = "–" if row["median_ratio"] is None else f"{row['median_ratio']:.2f}"
        table.add_row(row["forecast"], row["method"], fraction, str(row["n"]), *scores, ratio)
    print_results(table)


def print_parts(rows: Rows) -> None:
    """A row per group or block: what compressing it alone costs."""
    table = Table(title="one at a time, everything else dense", title_justify="left")
    scored = list(dict.fromkeys(name for row in rows for name in row.get("kept", {})))
    titles = ["", "method", "rank fraction", "½J", "measured KL"]
    titles += [title for name in scored for title in (name, "Δ", "Δ log-probability")]
    for place, title in enumerate(titles):
        table.add_column(title, justify="left" if place < 2 else "right", overflow="fold")
    for row in rows:
        cells = [row["group"], row["method"], f"{row['rank_fraction']:g}", f"{row['half_j']:.4f}"]
        cells.append(f"{row['kl']:.4f} ± {1.96 * row['kl_error']:.4f}")
        for name in scored:
            one = row["kept"][name]
            cells += [share(one["accuracy"]), difference(one["accuracy_difference"], one["accuracy_interval"], 100, 1)]
            cells.append(difference(one["log_probability_difference"], one["log_probability_interval"]))
        table.add_row(*cells)
    print_results(table)


def print_plans(rows: Rows) -> None:
    """A row per budget: what the plan of the whole model forecast, and what was measured."""
    table = Table(title="the forecast of the whole model, on held-out text", title_justify="left")
    titles = (
        "method",
        "budget",
        "parameters",
        "Σ ½J",
        "on held-out",
        "measured KL",
        "÷ Σ ½J",
        "perplexity × forecast",
        "measured",
    )
    for title in titles:
        table.add_column(title, justify="left" if title in ("method", "budget") else "right", overflow="fold")
    for row in rows:
        kl = f"{row['kl']:.4f} ± {1.96 * row['kl_error']:.4f}"
        known = row["half_j"] is not None
        unseen = "–" if row["half_j_held_out"] is None else f"{row['half_j_held_out']:.4f}"
        forecast = [f"{row['half_j']:.4f}" if known else "–", unseen, kl, f"{row['ratio']:.2f}" if row["ratio"] else "–"]
        ratios = [f"{exp(row['half_j']):.3f}" if known else "–", f"{exp(row['nll_increase']):.3f}"]
        table.add_row(row["method"], row["budget"], f"{row['param_fraction']:.1%}", *forecast, *ratios)
    print_results(table)


def validation_figure(rows: Rows, path: Path, *, better: str = "fasc", worse: str = "svd") -> Path:
    """Measured KL against ½J for each method, and against ρ the gain of one method over another."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(3.6 * (len(methods) + 1), 3.5), layout="constrained", dpi=160)
        axes = figure.subplots(1, len(methods) + 1, squeeze=False)[0]
        for axis, method in zip(axes, methods, strict=False):
            _losses(axis, [row for row in rows if row["method"] == method], method)
        _gains(axes[-1], rows, better, worse)
        return save_png(figure, path)


def _losses(axis: Axes, rows: Rows, method: str) -> None:
    for kind in dict.fromkeys(row["kind"] for row in rows):
        points = [(row["half_j"], row["kl"]) for row in rows if row["kind"] == kind and row["half_j"] > 0 and row["kl"] > 0]
        if points:
            axis.scatter(*zip(*points, strict=True), s=8, alpha=0.7, label=kind)
    axis.set(xscale="log", yscale="log", xlabel="½J, nats/token", ylabel="measured KL, nats/token")
    every = [value for row in rows for value in (row["half_j"], row["kl"]) if value > 0] or [1.0]
    axis.axline((min(every), min(every)), (max(every), max(every)), color="#888888", linewidth=0.8)
    axis.set_title(method, fontsize=9)
    axis.legend(fontsize=7, frameon=False)


def _gains(axis: Axes, rows: Rows, better: str, worse: str) -> None:
    by_case = {(row["group"], row["rank_fraction"], row["method"]): row for row in rows}
    points = [
        (row["rho"], by_case[group, fraction, worse]["kl"] / row["kl"])
        for (group, fraction, name), row in by_case.items()
        if name == better and row["rho"] is not None and row["kl"] > 0 and (group, fraction, worse) in by_case
    ]
    if points:
        axis.scatter(*zip(*points, strict=True), s=8, alpha=0.7, color="#444444")
        axis.set_yscale("log")
    axis.axhline(1, color="#888888", linewidth=0.8)
    axis.set(xlabel="ρ", ylabel=f"KL of {worse} ÷ KL of {better}")
    axis.set_title("does ρ predict the gain?", fontsize=9)
