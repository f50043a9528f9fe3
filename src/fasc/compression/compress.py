"""A plan carried out: the loop over its edits."""

from pathlib import Path

from transformers import PreTrainedModel

from fasc.compression.propagate import compress_in_order
from fasc.compression.shared import can_be_shared, share_edits
from fasc.edits import Edit
from fasc.edits.factor import Factor
from fasc.edits.remove import experts_apart, require_loadable
from fasc.edits.structure import parsed, structure_of
from fasc.errors import ModelError
from fasc.model.offload import in_reach, require_in_memory
from fasc.planning.plan import Plan
from fasc.progress import progress
from fasc.statistics.moments import Statistics


def carry_out(
    model: PreTrainedModel, statistics: Statistics, plan: Plan, *, propagate: bool = False, work: Path | None = None
) -> Plan:
    """Compress a model in place, edit by edit: :func:`carried_out` without the statistics of what is left."""
    return carried_out(model, statistics, plan, propagate=propagate, work=work)[0]


def carried_out(
    model: PreTrainedModel,
    statistics: Statistics,
    plan: Plan,
    *,
    propagate: bool = False,
    work: Path | None = None,
    shared: Path | None = None,
) -> tuple[Plan, Statistics]:
    """Compress a model in place, edit by edit.

    Args:
        model: the dense model that the statistics were measured on.
        statistics: with the moments that the plan's methods need.
        plan: edits in order; all are checked against the model before the first is made.
        propagate: compress the blocks in order, each from the inputs it gets from the compressed blocks below it.
        work: folder for finished blocks, with ``propagate``: an interrupted compression goes on there.
        shared: folder through which several processes share the edits; only the first then has the whole result, and the
            statistics come back as they were given.

    Returns:
        The plan as it was carried out: with ``predicted_loss`` (π ½J, nats per token) filled in where the statistics hold the
        unit's gradients, and with what the layouts chose. And the statistics of the layers that are left; with ``propagate``
        those that were given.

    Raises:
        ModelError: an edit does not fit the model, or the model is compressed already.
        StatisticsError: a moment or a group is missing.
        NonFiniteError: a new weight came out as NaN or infinity; names the layer. The model is then partly changed: load it
        again.
    """
    if structure_of(model) is not None:
        raise ModelError("the model is compressed already", "compress the dense model; `fasc recover` trains a compressed one")
    if propagate:
        require_in_memory(model, "--propagate")
    with experts_apart(model, plan.edits):
        plan.check(model)
        for edit in plan.edits:
            edit.require(statistics)
        require_loadable(model, plan.edits)
        if propagate:
            compress_in_order(model, statistics, plan, work)
        elif shared is not None and can_be_shared(plan):
            share_edits(model, statistics, plan, shared)
        else:
            with progress(f"compressing with {plan.method}", len(plan.edits), "edits") as advance:
                for edit in plan.edits:
                    with in_reach(model, edit.touches):
                        statistics = edit.apply(model, statistics)
                    advance()
    return plan.with_edits(_as_made(model, plan)), statistics


def _as_made(model: PreTrainedModel, plan: Plan) -> list[Edit]:
    """The plan's edits, structural ones as the model's structure records them."""
    structure = structure_of(model)
    recorded = {edit.touches: edit for edit in parsed(structure) if isinstance(edit, Factor)}
    return [recorded.get(edit.touches, edit) if isinstance(edit, Factor) else edit for edit in plan.edits]
