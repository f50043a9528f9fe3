"""What models kept of another, on the terminal, as a figure, and in a model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from fasc.evaluation.compared import Compared
from fasc.evaluation.paired import Paired
from fasc.reporting.console import print_results
from fasc.reporting.table import format_score
from fasc.storage import new_file

_BEGIN, _END = "<!-- fasc: what was kept -->", "<!-- fasc: end -->"
NOTE = (
    "lost and gained: items that only one of the two answers rightly; p: McNemar's exact test; differences have 95 % intervals "
    "from a bootstrap over subjects and relations; log-probability: of the right answer, in nats (of text: per token; of kl: "
    "minus the divergence)."
)
_DIVERGENCE = "kl"


def short(name: str) -> str:
    """The last part of a path, or the whole of a name."""
    return Path(name).name if Path(name).exists() else name


def share(value: float | None) -> str:
    """Of one, in percent."""
    return "–" if value is None else f"{100 * value:.1f} %"


def difference(value: float | None, interval: Sequence[float | None], scale: float = 1, digits: int = 3) -> str:
    """With its interval."""
    if value is None:
        return "–"
    low, high = interval
    bounds = "" if low is None or high is None else f" [{scale * low:+.{digits}f}, {scale * high:+.{digits}f}]"
    return f"{scale * value:+.{digits}f}{bounds}"


def cells(one: Paired) -> list[str]:
    """A row: the model against the reference."""
    flips = one.accuracy is not None
    return [
        short(one.model),
        short(one.reference),
        share(one.reference_accuracy),
        share(one.accuracy),
        str(one.lost) if flips else "–",
        str(one.gained) if flips else "–",
        "–" if one.p is None else f"{one.p:.2g}",
        difference(one.accuracy_difference, one.accuracy_interval, 100, 1),
        difference(one.log_probability_difference, one.log_probability_interval),
        one.verdict,
    ]


HEADER = ("model", "against", "right, against", "right, model", "lost", "gained", "p", "Δ points", "Δ log-probability", "kept")


def print_compared(result: Compared) -> None:
    """A table per benchmark, then groups."""
    for benchmark in dict.fromkeys(one.benchmark for one in result.pairs):
        rows = [one for one in result.pairs if one.benchmark == benchmark]
        table = Table(title=f"{benchmark}, n = {rows[0].n:,}", title_justify="left")
        for title in HEADER:
            table.add_column(title, justify="left" if title in WORDS else "right", overflow="fold")
        for one in rows:
            table.add_row(*cells(one))
        print_results(table)
        _print_groups([row for row in result.groups if row["benchmark"] == benchmark])
    _print_scores(result)
    if result.pairs:
        print_results(NOTE)


def _print_scores(result: Compared) -> None:
    head, rows = score_rows(result)
    if not rows:
        return
    table = Table(title="scores", title_justify="left")
    for title in head:
        table.add_column(title, justify="left" if title in WORDS else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    print_results(table)


def score_rows(result: Compared) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of what the pairs do not show: scores of text, and what is itself a difference from the reference."""
    answered = {one.benchmark for one in result.pairs if one.accuracy is not None}
    found = [(name, one) for name in result.names for one in result.scores.get(name, ()) if one.benchmark not in answered]
    rows = [
        [short(name), one.benchmark, one.metric, format_score(one.to_dict()), f"{one.n:,}", one.protocol]
        for name, one in sorted(found, key=lambda row: row[1].benchmark)
    ]
    return ["model", "benchmark", "metric", "value [95 % interval]", "n", "how"], rows


WORDS = ("group", "model", "against", "kept", "benchmark", "metric", "how")
"""Columns of words; all others hold numbers."""

GROUP_HEADER = ("group", "n", "model", "right, against", "right, model", "lost", "gained", "Δ log-probability", "kept")


def group_cells(row: Mapping[str, Any]) -> list[str]:
    """A row: the model against the reference, in one group of items."""
    return [
        f"{row['kind']}: {row['group']}",
        f"{row['n']:,}",
        short(row["model"]),
        share(row["reference_accuracy"]),
        share(row["accuracy"]),
        str(row["lost"]),
        str(row["gained"]),
        difference(row["log_probability_difference"], row["log_probability_interval"]),
        row["verdict"],
    ]


def _print_groups(rows: Sequence[Mapping[str, Any]]) -> None:
    if not rows:
        return
    table = Table(title="by group", title_justify="left")
    for title in GROUP_HEADER:
        table.add_column(title, justify="left" if title in WORDS else "right", overflow="fold")
    for row in rows:
        table.add_row(*group_cells(row))
    print_results(table)


def draw_compared(result: Compared, file: Path) -> None:
    """A figure: for each benchmark and model the difference from the reference, with its interval."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import

    from fasc.outputs import PNG_AUTHOR  # noqa: PLC0415

    reference = result.names[0]
    rows = [one for one in result.pairs if one.reference == reference and one.log_probability_difference is not None]
    benchmarks = list(dict.fromkeys(one.benchmark for one in rows))
    models = list(result.names[1:])
    figure = Figure(figsize=(8, 1.2 + 0.35 * max(1, len(rows))), layout="constrained")
    axis = figure.subplots()
    ticks = []
    for position, (benchmark, model) in enumerate((b, m) for b in benchmarks for m in models):
        one = next((row for row in rows if row.benchmark == benchmark and row.model == model), None)
        ticks.append(f"{benchmark}: {short(model)}")
        if one is None or one.log_probability_difference is None:
            continue
        low, high = one.log_probability_interval
        colour = _COLOURS[models.index(model) % len(_COLOURS)]
        if low is not None and high is not None:
            axis.plot([low, high], [position, position], color=colour, linewidth=2)
        axis.plot(one.log_probability_difference, position, marker=_MARKS[models.index(model) % len(_MARKS)], color=colour)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(ticks)), ticks)
    axis.invert_yaxis()
    axis.set_xlabel(f"log-probability of the right answer, minus that of {short(reference)}, nats; 95 % intervals")
    with new_file(file) as scratch:
        figure.savefig(scratch, format="png", dpi=150, metadata={"Software": PNG_AUTHOR})


_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")
_MARKS = ("o", "s", "^", "D", "v")


def certificate(result: Compared, model: str) -> str:
    """Markdown for the model card: what this model kept of the reference."""
    rows = [one for one in result.pairs if one.model == model and one.reference == result.names[0]]
    lines = [
        _BEGIN,
        f"## What was kept of {short(result.names[0])}",
        "",
        "| benchmark | n | dense model | this model | lost | gained | p | Δ log-probability, nats | |",
        "|---|--:|--:|--:|--:|--:|--:|--:|---|",
    ]
    for one in rows:
        _, _, before, after, lost, gained, p, _, log, verdict = cells(one)
        lines.append(f"| {one.benchmark} | {one.n:,} | {before} | {after} | {lost} | {gained} | {p} | {log} | {verdict} |")
    divergence = next((one for one in result.scores.get(model, ()) if one.metric == _DIVERGENCE), None)
    if divergence is not None and all(one.benchmark != divergence.benchmark for one in rows):
        value = f"{format_score(divergence.to_dict())} from the dense model"
        lines.append(f"| {divergence.benchmark} | {divergence.n:,} | – | {value} | – | – | – | – | |")
    return "\n".join([*lines, "", NOTE, _END])
