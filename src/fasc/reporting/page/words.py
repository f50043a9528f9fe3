"""What a person wants to know first, in plain words: how small, what it kept, what it cost, is it faster."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp
from typing import Any

from fasc.reporting.entries import benchmarks_of
from fasc.reporting.headline import right_answers
from fasc.reporting.page.comparison import megabytes
from fasc.reporting.page.rows import dense_of, divergence_of
from fasc.reporting.page.sources import Model
from fasc.reporting.table import base_name, format_score, is_share

_MOST = 3
"""Benchmarks of right answers that the headline speaks of."""

Score = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Summary:
    """Of one model, a sentence each; the numbers stand in the table."""

    name: str
    size: str
    kept: str
    cost: str
    speed: str

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """Question and answer."""
        return (
            ("How small is it?", self.size),
            ("What did it keep?", self.kept),
            ("What did that cost?", self.cost),
            ("Is it faster?", self.speed),
        )


def summary_of(model: Model, models: Sequence[Model]) -> Summary:
    """The four sentences on a compressed model."""
    dense = dense_of(models, model)
    return Summary(model.name, _size(model), _kept(model, dense), _cost(model, dense), _speed(model))


def title_of(model: Model, models: Sequence[Model]) -> str:
    """One sentence on the model that is spoken of first."""
    dense = dense_of(models, model)
    parts = []
    if model.bytes and model.dense_bytes:
        parts.append(f"weighs {model.bytes / (model.dense_bytes or 1):.0%} of the dense model")
    pair = next(iter(_pairs(model, dense)), None)
    if pair is not None:
        parts.append(f"gives {right_answers(pair[1], pair[2], pair[0])}")
    ratio = model.entry.speed("decode")
    if ratio is not None:
        parts.append(f"decodes at {ratio[0]:.2f} × its speed")
    return f"{model.name} " + (", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else "".join(parts)) + "."


def _size(model: Model) -> str:
    own, dense = model.bytes, model.dense_bytes
    if not own or not dense:
        return "Not known: there is no plan."
    words = f"{megabytes(own)} MB of weights instead of {megabytes(dense)} MB: {own / dense:.0%}."
    if model.plan is not None and not model.merged:
        adds = model.plan.totals["multiply_add_fraction"] or 0
        words += f" Its compressed layers do {adds:.0%} of the multiply-adds."
    return words


def _pairs(model: Model, dense: Model | None) -> list[tuple[str, Score, Score]]:
    """Name, own and the dense model's score of each benchmark of right answers."""
    found = []
    for name in benchmarks_of([*([dense.entry] if dense else []), model.entry]):  # in the order of the headline
        own = model.entry.score(name)
        before = dense.entry.score(name) if dense else None
        if own and before and is_share(own) and before["value"] > 0:
            found.append((name, own, before))
    return found


def _kept(model: Model, dense: Model | None) -> str:
    parts = []
    for name, own, before in _pairs(model, dense)[:_MOST]:
        parts.append(
            f"{name}: {100 * own['value']:.1f} % right of {own['n']:,}, dense {100 * before['value']:.1f} %{_apart(own, before)}"
        )
    if parts:
        return "; ".join(parts) + "."
    alone = [score for score in model.entry.scores if str(score["metric"]).startswith("accuracy")]
    if alone:
        return (
            f"{alone[0]['benchmark']}: {format_score(alone[0])}; the dense model's scores are not here: "
            "`fasc evaluate DENSE --json dense.json`, then `fasc report … --dense dense.json`."
        )
    if model.entry.scores:
        return "No benchmark of right answers was asked."
    return f"Not measured: `fasc evaluate {model.place} --json {model.beside('scores')}` writes the file that is looked for."


def _apart(own: Score, before: Score) -> str:
    bounds = (own["low"], own["high"], before["low"], before["high"])
    if None in bounds:
        return ""
    if own["high"] < before["low"] or own["low"] > before["high"]:
        return " (the intervals lie apart)"
    return " (the intervals overlap: `fasc compare`, item by item, can tell more)"


def _cost(model: Model, dense: Model | None) -> str:
    parts = []
    own = divergence_of(model)
    if own is not None:
        parts.append(f"KL divergence from the dense model {format_score(own)} nats per token")
    for name in benchmarks_of([model.entry]):
        if base_name(name) == "perplexity":
            before = dense.entry.score(name) if dense else None
            beside = "" if before is None else f", dense {format_score(before)}"
            parts.append(f"{name} {format_score(model.entry.score(name))}{beside}")
    forecast = None if model.plan is None else model.plan.predicted_loss
    if not parts and forecast is not None:
        ratio = exp(min(forecast, 700))
        words = f"Forecast alone: KL {forecast:.3f} nats per token, perplexity × {ratio:.2f}. Real text can cost more."
        return words if model.caution is None else f"{words} It is not to be trusted: {model.caution}."
    return _sentence(parts) or "Not measured."


def _speed(model: Model) -> str:
    parts = []
    for what in ("prefill", "decode"):
        found = model.entry.speed(what)
        if found is not None:
            ratio, low, high = found
            verdict = "faster" if low > 1 else "slower" if high < 1 else "no difference that can be told"
            parts.append(f"{what} {ratio:.2f} × the dense model's speed [{low:.2f}, {high:.2f}]: {verdict}")
    return _sentence(parts) or f"Not timed: `fasc bench {model.place} --json {model.beside('speed')}` does."


def _sentence(parts: Sequence[str]) -> str:
    text = "; ".join(parts)
    return text and f"{text[0].upper()}{text[1:]}."
