"""Facts, ρ and gain over a training: a table and curves."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from rich.table import Table

from fasc.outputs import PNG_AUTHOR
from fasc.reporting.console import print_results
from fasc.storage import new_file

_CURVES = {"accuracy": "facts known", "debiased": "ρ, debiased, mean over groups", "gain": "log(KL of svd ÷ KL of fasc), median"}
_COLOURS = {"facts": "#0072B2", "shuffled": "#D55E00"}


def _points(result: Mapping[str, Any], arm: str, key: str) -> list[tuple[int, float]]:
    rows = [row for row in result["rows"] if row["arm"] == arm]
    return [(step, mean(row[key] for row in rows if row["step"] == step)) for step in sorted({row["step"] for row in rows})]


def print_emergence(result: Mapping[str, Any]) -> None:
    """A row per arm and checkpoint, means over seeds."""
    table = Table()
    for title in ("text", "step", "facts known", "ρ", "noise floor", "debiased ρ", "gain of fasc over svd"):
        table.add_column(title, justify="left" if title == "text" else "right")
    for arm in dict.fromkeys(row["arm"] for row in result["rows"]):
        columns = {key: dict(_points(result, arm, key)) for key in ("accuracy", "rho", "floor", "debiased", "gain")}
        names = {row["step"]: row.get("name", f"{row['step']:,}") for row in result["rows"]}
        for step in columns["rho"]:
            table.add_row(
                arm,
                names[step],
                f"{100 * columns['accuracy'][step]:.1f} %",
                *(f"{columns[key][step]:.3f}" for key in ("rho", "floor", "debiased", "gain")),
            )
    print_results(table)


def draw_emergence(result: Mapping[str, Any], file: Path) -> None:
    """Three curves over the steps, facts beside the control."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    figure = Figure(figsize=(10, 3.2), layout="constrained")
    axes = figure.subplots(1, len(_CURVES))
    for axis, (key, title) in zip(axes, _CURVES.items(), strict=True):
        for arm, marker in (("facts", "o"), ("shuffled", "s")):
            points = _points(result, arm, key)
            if points:
                axis.plot(*zip(*points, strict=True), marker=marker, color=_COLOURS[arm], label=arm)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("step")
    axes[0].legend()
    with new_file(file) as scratch:
        figure.savefig(scratch, format="png", dpi=150, metadata={"Software": PNG_AUTHOR})
