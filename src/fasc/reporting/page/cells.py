"""Block × kind: what a diagnosis found in each place, and what a plan makes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fasc.edits.attention import Heads, Values
from fasc.edits.factor import Factor
from fasc.edits.narrow import Narrow
from fasc.edits.quantise import Quantise
from fasc.edits.remove import Remove
from fasc.edits.skip import Skip
from fasc.model.layers import Layer
from fasc.planning.plan import Plan
from fasc.reporting.page.sources import Model, Source

Cell = tuple[int, str, float, str]
"""Block, kind, value, and the value in words."""


@dataclass(frozen=True, slots=True)
class Field:
    """One quantity over all blocks, for every subject (a run or a model) that has it."""

    name: str
    title: str
    words: str
    subjects: Mapping[str, Sequence[Cell]]
    share: bool = False
    """Whether it lies between 0 and 1."""


def fields_of(sources: Sequence[Source], models: Sequence[Model]) -> list[Field]:
    """All quantities that are known of anything."""
    diagnoses = {source.name: source.diagnosis for source in sources if source.diagnosis}
    plans = {model.name: model.plan for model in models if model.plan is not None}
    found = [
        Field("rho", "ρ", "dependence of inputs and gradients", _found(diagnoses, _diagnosed("rho"))),
        Field("rho-debiased", "ρ without noise", "ρ less its noise floor", _found(diagnoses, _diagnosed("rho_debiased"))),
        Field("loss", "forecast loss", "½J of the edits, nats per token", _found(plans, _losses)),
        Field("rank", "rank kept", "rank ÷ full rank of each layer", _found(plans, _ranks), share=True),
        Field("parts", "channels and heads kept", "parts that stay ÷ parts", _found(plans, _parts), share=True),
        Field("bits", "bits", "bits of a weight", _found(plans, _bits)),
    ]
    return [field for field in found if field.subjects]


def _found(sources: Mapping[str, Any], cells: Callable[[Any], list[Cell]]) -> dict[str, list[Cell]]:
    return {name: made for name, source in sources.items() if (made := cells(source))}


def _gathered(
    values: Mapping[tuple[int, str], Sequence[float]], words: Callable[[float], str], *, total: bool = False
) -> list[Cell]:
    """A cell for each place: the mean over a block's experts, or their sum."""
    made = []
    for (block, kind), several in values.items():
        value = sum(several) if total else fmean(several)
        made.append((block, kind, float(f"{value:.4g}"), words(value)))
    return made


def _put(values: dict[tuple[int, str], list[float]], place: tuple[int | None, str], value: float) -> None:
    if place[0] is not None:
        values.setdefault((place[0], place[1]), []).append(value)


def _diagnosed(key: str) -> Callable[[Mapping[str, Any]], list[Cell]]:
    def cells(diagnosis: Mapping[str, Any]) -> list[Cell]:
        values: dict[tuple[int, str], list[float]] = {}
        for row in diagnosis["groups"]:
            if row[key] is not None:
                _put(values, (row["block"], row["kind"]), row[key])
        return _gathered(values, lambda value: f"{value:.3f}")

    return cells


def _place(name: str) -> tuple[int | None, str]:
    """Block and kind of a layer or of a group, by its name."""
    kind = name.rsplit(".", 1)[-1]
    return Layer(name, 1, 1, bias=False).block, kind


def _losses(plan: Plan) -> list[Cell]:
    values: dict[tuple[int, str], list[float]] = {}
    for edit in plan.edits:
        if edit.predicted_loss is not None:
            name = edit.group if isinstance(edit, (Factor, Quantise)) else edit.touches[-1]
            _put(values, _place(name), edit.predicted_loss)
    return _gathered(values, lambda value: f"{value:.2e} nats", total=True)


def _ranks(plan: Plan) -> list[Cell]:
    """Of every layer; one that is not factored has its full rank, one that is left out has none."""
    factored = {name: edit for edit in plan.edits if isinstance(edit, Factor) for name in edit.touches}
    skipped = {name for edit in plan.edits if isinstance(edit, Skip) for name in edit.touches}
    if not factored and not skipped:
        return []
    values: dict[tuple[int, str], list[float]] = {}
    for layer in plan.layers:
        edit = factored.get(layer.name)
        share = 0.0 if layer.name in skipped else 1.0 if edit is None else min(1.0, edit.rank / edit.unit.full_rank)
        _put(values, (layer.block, layer.kind), share)
    return _gathered(
        values, lambda value: "left out" if value == 0 else "full rank" if value == 1 else f"{value:.1%} of the rank"
    )


def _parts(plan: Plan) -> list[Cell]:
    kept: dict[str, dict[int, float]] = {}
    for edit in plan.edits:
        share = _share_of(edit)
        block = _place(edit.touches[-1])[0]
        if share is not None and block is not None:
            kept.setdefault(share[0], {})[block] = share[1]
    blocks = sorted({layer.block for layer in plan.layers if layer.block is not None})
    values = {(block, what): [found.get(block, 1.0)] for what, found in kept.items() for block in blocks}
    return _gathered(values, lambda value: f"{value:.1%} stay")


def _share_of(edit: Any) -> tuple[str, float] | None:
    if isinstance(edit, Narrow):
        return "MLP channels", edit.width / edit.channels
    if isinstance(edit, Heads):
        return "heads", edit.count / edit.heads
    if isinstance(edit, Values):
        return "value features", edit.size / edit.width
    if isinstance(edit, Remove):
        return "MLP channels" if edit.part == "channels" else edit.part, edit.count / edit.parts
    if isinstance(edit, Skip):
        return "sublayers", 0.0
    return None


def _bits(plan: Plan) -> list[Cell]:
    rounded = {name: edit.bits for edit in plan.edits if isinstance(edit, Quantise) for name in edit.touches}
    if not rounded:
        return []
    values: dict[tuple[int, str], list[float]] = {}
    for layer in plan.layers:
        _put(values, (layer.block, layer.kind), rounded.get(layer.name, 8 * plan.model.bytes_per_parameter))
    return _gathered(values, lambda value: f"{value:g} bits")
