"""A plan carried out by several processes: each makes some of the edits, and the first one gets them all through files."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import PreTrainedModel

from fasc.compression.parts import load_part, recorded, save_part
from fasc.edits import Edit, read_edit
from fasc.model.layers import Layer
from fasc.planning.plan import Plan
from fasc.processes import current
from fasc.progress import progress
from fasc.provenance import digest
from fasc.statistics.moments import Statistics


def can_be_shared(plan: Plan) -> bool:
    """Whether every edit leaves modules of its own, and none goes by what others have left of the whole model."""
    return current().count > 1 and all(edit.structural for edit in plan.edits)


def share_edits(model: PreTrainedModel, statistics: Statistics, plan: Plan, work: Path) -> None:
    """Make a share of the edits in each process, in place; the first process ends with the whole compressed model.

    Edits that work on the same layer belong together, because the later ones go by what the earlier ones have left. Edits that
    only take layers apart are made in every process, and those outside the plan's layers in the first.

    Args:
        model: the dense model, the same in every process.
        statistics: of it.
        plan: whose edits all have modules of their own.
        work: a folder that all processes see.

    Raises:
        UsageError: a process has another plan; nothing is changed then.
        ProcessLostError: another process has ended.
        FascError: an edit's own.
    """
    # Each process has made the plan itself. Were two not the same, an edit could be made twice, or by nobody.
    current().require_same({"plan": digest(json.dumps(edit.to_dict()).encode() for edit in plan.edits)})
    chains = chains_of(plan.edits)
    sizes = {layer.name: layer for layer in plan.layers}
    costs = [sum(_cost(plan.edits[place], sizes) for place in chain) for chain in chains]
    owners = current().owners(costs)
    outside = [not any(name in sizes for place in chain for name in plan.edits[place].touches) for chain in chains]
    owned = [0 if first else rank for first, rank in zip(outside, owners, strict=True)]
    own = sorted(place for chain, rank in zip(chains, owned, strict=True) if rank == current().rank for place in chain)
    before = 0
    with progress(f"compressing with {plan.method}", len(own), "edits") as advance:
        for edit in (edit for edit in plan.edits if edit.keeps_weights):
            statistics = edit.apply(model, statistics)
            before += 1
        for place in own:
            statistics = plan.edits[place].apply(model, statistics)
            advance()
    if not current().first:
        save_part(model, recorded(model)[before:], work / _name(current().rank))
    current().wait()
    if current().first:
        for rank in range(1, current().count):
            load_part(model, work / _name(rank))
        order = {_key(edit): place for place, edit in enumerate(plan.edits)}
        recorded(model).sort(key=lambda raw: order[_key(read_edit(raw, "a finished part"))])


def chains_of(edits: Sequence[Edit]) -> list[list[int]]:
    """Places of the edits that belong together, in order; edits that keep the weights belong to none."""
    chain_of: dict[str, list[int]] = {}
    for place, edit in enumerate(edits):
        if edit.keeps_weights:
            continue
        joined = list({id(chain): chain for name in edit.touches if (chain := chain_of.get(name)) is not None}.values())
        whole = sorted([place, *(one for chain in joined for one in chain)])
        for name in (name for one in whole for name in edits[one].touches):
            chain_of[name] = whole
    return sorted({id(chain): chain for chain in chain_of.values()}.values())


def _key(edit: Edit) -> tuple[str, tuple[str, ...]]:
    return edit.edit, edit.touches


def _cost(edit: Edit, sizes: Mapping[str, Layer]) -> float:
    """As decompositions cost: by the cube of the smaller side."""
    layers = [sizes[name] for name in edit.touches if name in sizes]
    return float(sum(layer.d_in * layer.d_out * min(layer.d_in, layer.d_out) for layer in layers))


def _name(rank: int) -> str:
    return f"edits-{rank}.safetensors"
