"""Block × kind: what a diagnosis found in each place, and what a plan makes of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fasc.edits.attention import Heads
from fasc.edits.attention import Values as ValueFeatures
from fasc.edits.factor import Factor
from fasc.edits.narrow import Narrow
from fasc.edits.quantise import Quantise
from fasc.edits.remove import Remove
from fasc.edits.skip import Skip
from fasc.model.layers import Layer
from fasc.planning.experts import expert_touched, experts_in
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
        Field("expert-rho", "ρ of experts", "ρ of each expert, the mean over its groups", _found(diagnoses, _experts_rho)),
        Field(
            "expert-loss", "forecast loss of experts", "½J of each expert by the first method", _found(diagnoses, _experts_loss)
        ),
        Field("expert-kept", "experts kept", "parameters of each expert that stay", _found(plans, _experts_kept), share=True),
    ]
    return [field for field in found if field.subjects]


def _found(sources: Mapping[str, Any], cells: Callable[[Any], list[Cell]]) -> dict[str, list[Cell]]:
    return {name: made for name, source in sources.items() if (made := cells(source))}


Values = dict[tuple[int, str], list[tuple[float, str]]]
"""By block and kind: a value, and its words, for each expert."""


def _gathered(values: Values, form: str, *, total: bool = False) -> list[Cell]:
    """A cell for each place, in its own words; of a block's experts the mean, or the sum, in the given form."""
    made = []
    for (block, kind), several in values.items():
        numbers = [value for value, _ in several]
        value = sum(numbers) if total else fmean(numbers)
        words = several[0][1] if len(several) == 1 and several[0][1] else form.format(value)
        made.append((block, kind, float(f"{value:.4g}"), words))
    return made


def _put(values: Values, place: tuple[int | None, str], value: float, words: str = "") -> None:
    if place[0] is not None:
        values.setdefault((place[0], place[1]), []).append((value, words))


def _diagnosed(key: str) -> Callable[[Mapping[str, Any]], list[Cell]]:
    def cells(diagnosis: Mapping[str, Any]) -> list[Cell]:
        values: Values = {}
        for row in diagnosis["groups"]:
            if row[key] is not None:
                _put(values, (row["block"], row["kind"]), row[key])
        return _gathered(values, "{:.3f}")

    return cells


def _place(name: str) -> tuple[int | None, str]:
    """Block and kind of a layer or of a group, by its name."""
    kind = name.rsplit(".", 1)[-1]
    return Layer(name, 1, 1, bias=False).block, kind


def _losses(plan: Plan) -> list[Cell]:
    values: Values = {}
    for edit in plan.edits:
        if edit.predicted_loss is not None:
            name = edit.group if isinstance(edit, (Factor, Quantise)) else edit.touches[-1]
            _put(values, _place(name), edit.predicted_loss)
    return _gathered(values, "{:.2e} nats", total=True)


def _ranks(plan: Plan) -> list[Cell]:
    """Of every layer; one that is not factored has its full rank, one that is left out has none."""
    factored = {name: edit for edit in plan.edits if isinstance(edit, Factor) for name in edit.touches}
    skipped = {name for edit in plan.edits if isinstance(edit, Skip) for name in edit.touches}
    if not factored and not skipped:
        return []
    values: Values = {}
    for layer in plan.layers:
        edit = factored.get(layer.name)
        if layer.name in skipped:
            _put(values, (layer.block, layer.kind), 0.0, "left out")
        elif edit is None:
            _put(values, (layer.block, layer.kind), 1.0, "full")
        else:
            full = edit.unit.full_rank
            _put(values, (layer.block, layer.kind), min(1.0, edit.rank / full), f"{edit.rank} of {full}")
    return _gathered(values, "{:.1%}")


def _parts(plan: Plan) -> list[Cell]:
    """Of every block; parts of its experts together."""
    kept: dict[str, dict[int, tuple[int, int]]] = {}
    for edit in plan.edits:
        found = _count_of(edit)
        block = _place(edit.touches[-1])[0]
        if found is not None and block is not None and expert_touched(edit) is None:
            kept.setdefault(found[0], {})[block] = found[1:]
    for one in experts_in(plan).values():
        if one.block is not None and not one.dropped:
            left, all_of = kept.setdefault("expert channels", {}).get(one.block, (0, 0))
            kept["expert channels"][one.block] = left + one.width, all_of + one.channels
    values: Values = {}
    for what, by_block in kept.items():
        if what == "expert channels" and all(left == all_of for left, all_of in by_block.values()):
            continue
        for block in sorted({layer.block for layer in plan.layers if layer.block is not None}):
            left, all_of = by_block.get(block, (1, 1))
            _put(values, (block, what), left / all_of, f"{left:,} of {all_of:,}" if block in by_block else "all")
    return _gathered(values, "{:.1%}")


def _experts_kept(plan: Plan) -> list[Cell]:
    experts = experts_in(plan).values()
    if all(one.is_dense for one in experts):
        return []
    values: Values = {}
    for one in experts:
        _put(values, (one.block, _expert(one.expert)), one.kept, f"{one.kept:.1%}: {one.words()}")
    return _gathered(values, "{:.1%}")


def _experts_rho(diagnosis: Mapping[str, Any]) -> list[Cell]:
    values: Values = {}
    for row in diagnosis.get("experts", ()):
        for rho in row["rho"].values():
            if rho is not None:
                _put(values, (row["block"], _expert(row["expert"])), rho)
    return _gathered(values, "{:.3f}")


def _experts_loss(diagnosis: Mapping[str, Any]) -> list[Cell]:
    values: Values = {}
    for row in diagnosis.get("experts", ()):
        for loss in list(row["predicted_loss"].values())[:1]:
            words = f"{loss:.2e} nats, {row['tokens']:,} tokens ({row['share']:.1%})"
            _put(values, (row["block"], _expert(row["expert"])), loss, words)
    return _gathered(values, "{:.2e}")


def _expert(index: int) -> str:
    return f"expert {index}"


def _count_of(edit: Any) -> tuple[str, int, int] | None:
    """What an edit leaves out parts of, how many stay, of how many."""
    if isinstance(edit, Narrow):
        return "MLP channels", edit.width, edit.channels
    if isinstance(edit, Heads):
        return "heads", edit.count, edit.heads
    if isinstance(edit, ValueFeatures):
        return "value features", edit.size, edit.width
    if isinstance(edit, Remove):
        return "MLP channels" if edit.part == "channels" else edit.part, edit.count, edit.parts
    if isinstance(edit, Skip):
        return "sublayers", 0, 1
    return None


def _bits(plan: Plan) -> list[Cell]:
    rounded = {name: edit.bits for edit in plan.edits if isinstance(edit, Quantise) for name in edit.touches}
    if not rounded:
        return []
    values: Values = {}
    for layer in plan.layers:
        _put(values, (layer.block, layer.kind), rounded.get(layer.name, 8 * plan.model.bytes_per_parameter))
    return _gathered(values, "{:.3g} bits")
