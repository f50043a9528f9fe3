"""One sentence on a run, made of its numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

from fasc.evaluation.score import ratio_interval
from fasc.reporting.entries import DENSE, Entry, benchmarks_of


def headline(entries: Sequence[Entry]) -> str:
    """How many right answers the models give beside the dense one, or how far they are from it, at which size."""
    compressed = [entry for entry in entries if entry.name != DENSE and entry.plan]
    if not compressed:
        return "the dense model"
    sizes = {round(entry.plan["totals"]["param_fraction"], 2) for entry in compressed if entry.plan}
    at = f"at {next(iter(sizes)):.0%} of the layers' parameters: " if len(sizes) == 1 else ""
    parts = [text for entry in _best_and_worst(entries, compressed) if (text := _kept(entries, entry))]
    if parts:
        return at + "; ".join(parts)
    count = f"{len(compressed)} compressed model{'s' * (len(compressed) > 1)}"
    beside = any(entry.name == DENSE for entry in entries)
    if beside:
        return f"{count} beside the dense one"
    return f"{count}; the dense one's scores are not here: `fasc evaluate DENSE --json dense.json`, then `--dense dense.json`"


def _best_and_worst(entries: Sequence[Entry], compressed: Sequence[Entry]) -> list[Entry]:
    """With many models, those that kept most and least."""
    if len(compressed) <= 3:
        return list(compressed)
    benchmark = _accuracy(entries)
    scored = [entry for entry in compressed if benchmark and entry.score(benchmark)]
    ordered = sorted(scored, key=lambda entry: -(entry.score(benchmark or "") or {"value": 0.0})["value"])
    return [ordered[0], ordered[-1]] if ordered else []


def _accuracy(entries: Sequence[Entry]) -> str | None:
    """The first benchmark of right answers that the dense model was asked, too."""
    for name in benchmarks_of(entries):
        dense = next((entry.score(name) for entry in entries if entry.name == DENSE), None)
        if dense is not None and dense["metric"].startswith("accuracy") and dense["value"] > 0:
            return name
    return None


def _kept(entries: Sequence[Entry], entry: Entry) -> str | None:
    benchmark = _accuracy(entries)
    if benchmark is None:
        return None
    dense = next(one.score(benchmark) for one in entries if one.name == DENSE)
    own = entry.score(benchmark)
    return None if own is None or dense is None else f"{entry.name} gives {right_answers(own, dense, benchmark)}"


def right_answers(own: Mapping[str, Any], dense: Mapping[str, Any], benchmark: str) -> str:
    """How many right answers a model gives beside the dense one, with an interval; answers that it gained count like others."""
    low, high = ratio_interval(own["value"], dense["value"], own["n"], dense["n"])
    interval = "" if low is None or high is None else f" [{low:.0%}, {high:.0%}]"
    ratio = own["value"] / dense["value"]
    return f"{ratio:.0%}{interval} as many right answers on {benchmark} as the dense model (n = {own['n']:,})"
