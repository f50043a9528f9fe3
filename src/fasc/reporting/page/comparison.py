"""The comparison table: cells with what they are sorted by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fasc.reporting.entries import benchmarks_of
from fasc.reporting.page.sources import Model
from fasc.reporting.table import base_name, is_share

_FALLING = ("perplexity", "kl")


@dataclass(frozen=True, slots=True)
class Cell:
    """What is shown, in small beside it, and the number it is sorted by."""

    text: str
    small: str = ""
    key: float | str | None = None

    @property
    def plain(self) -> str:
        """Both in one line."""
        return f"{self.text} {self.small}".strip()


@dataclass(frozen=True, slots=True)
class Column:
    """A title, and which way is better: ``↓``, ``↑`` or nothing."""

    title: str
    better: str = ""
    unit: str = ""

    @property
    def plain(self) -> str:
        """In one line."""
        return " ".join(part for part in (self.title, f"({self.unit})" if self.unit else "", self.better) if part)


NOTHING = Cell("–")

Table = tuple[list[Column], list[tuple[Model, list[Cell]]]]
"""Columns after the model's name; a row per model."""


def comparison_of(models: Sequence[Model]) -> Table:
    """Scores with intervals, the forecast, and what the model weighs, computes and takes."""
    benchmarks = benchmarks_of([model.entry for model in models])
    columns = [score_column(name, models) for name in benchmarks]
    cells = {model.name: [score_cell(model.entry.score(name)) for name in benchmarks] for model in models}
    for column, values in _sizes(models):
        if any(cell is not NOTHING for cell in values):
            columns.append(column)
            for model, cell in zip(models, values, strict=True):
                cells[model.name].append(cell)
    return columns, [(model, cells[model.name]) for model in models]


def score_column(benchmark: str, models: Sequence[Model]) -> Column:
    """Of a benchmark, by what its scores are."""
    score = next((found for model in models if (found := model.entry.score(benchmark))), None)
    share = score is not None and is_share(score)
    name = base_name(benchmark)
    unit = "%" if share else "nats" if name == "kl" else ""
    return Column(
        ("KL" if name == "kl" else name) + benchmark[len(name) :], "↓" if name in _FALLING else "↑" if share else "", unit
    )


def score_cell(score: Mapping[str, Any] | None) -> Cell:
    """Value and interval."""
    if score is None:
        return NOTHING
    scale = 100.0 if is_share(score) else 1.0
    value = scale * score["value"]
    digits = 1 if scale > 1 else 3 if base_name(score["benchmark"]) == "kl" else 2 if value < 100 else 1
    bounds = [None if score[key] is None else scale * score[key] for key in ("low", "high")]
    words = ["…" if bound is None else f"{bound:,.{digits}f}" for bound in bounds]
    return Cell(f"{value:,.{digits}f}", "" if bounds == [None, None] else f"[{words[0]}, {words[1]}]", value)


def _sizes(models: Sequence[Model]) -> list[tuple[Column, list[Cell]]]:
    return [
        (Column("forecast Σ ½J", "↓", "nats"), [_forecast(model) for model in models]),
        (Column("weights", "↓", "MB"), [_weights(model) for model in models]),
        (Column("parameters kept", "", "%"), [_share(model, "param_fraction") for model in models]),
        (Column("multiply-adds", "↓", "%"), [_multiply_adds(model) for model in models]),
        (Column("bits a weight", "↓"), _bits(models)),
        (Column("prefill", "↑", "× dense"), [_speed(model, "prefill") for model in models]),
        (Column("decode", "↑", "× dense"), [_speed(model, "decode") for model in models]),
    ]


def _forecast(model: Model) -> Cell:
    loss = None if model.plan is None else model.plan.predicted_loss
    doubt = "" if model.caution is None else "not to be trusted"
    return NOTHING if loss is None or not model.plan or not model.plan.edits else Cell(f"{loss:.3f}", doubt, loss)


def _weights(model: Model) -> Cell:
    own, dense = model.bytes, model.dense_bytes
    return NOTHING if not own or not dense else Cell(megabytes(own), f"{own / dense:.0%}", own)


def megabytes(size: float) -> str:
    """Bytes in MB, with a digit after the point where there are few."""
    return f"{size / 1e6:,.{0 if size >= 10e6 else 1 if size >= 1e6 else 3}f}"


def _share(model: Model, name: str) -> Cell:
    value = 1.0 if model.plan is None else float(model.plan.totals[name] or 0)
    return Cell(f"{100 * value:.1f}", key=value)


def _multiply_adds(model: Model) -> Cell:
    if model.multiply_adds is None:
        return NOTHING
    plan = model.plan
    value = 1.0 if plan is None or model.merged else float(plan.totals["multiply_add_fraction"] or 0)
    return Cell(f"{100 * value:.1f}", key=value)


def _bits(models: Sequence[Model]) -> list[Cell]:
    rounded = any(model.plan and any(edit.edit == "quantise" for edit in model.plan.edits) for model in models)
    return [
        Cell(f"{model.plan.bits_per_weight:.2f}", key=model.plan.bits_per_weight) if rounded and model.plan else NOTHING
        for model in models
    ]


def _speed(model: Model, what: str) -> Cell:
    found = model.entry.speed(what)
    return NOTHING if found is None else Cell(f"{found[0]:.2f}", f"[{found[1]:.2f}, {found[2]:.2f}]", found[0])
