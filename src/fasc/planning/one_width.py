"""One MLP width for all blocks: what a plan with ``channels`` makes under the allocation ``uniform``."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from fasc.edits.narrow import Narrow
from fasc.errors import BudgetError
from fasc.forecast.channels import channel_curves, narrowing_key
from fasc.layouts import LAYOUTS
from fasc.methods import Solver
from fasc.model.coupling import Coupling, find_channels
from fasc.model.groups import InputGroup
from fasc.planning.candidates import step_of
from fasc.planning.limits import limit_of
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import Plan
from fasc.statistics.moments import Statistics


def asks_for_one_width(options: MethodConfig) -> bool:
    """Whether a plan narrows every MLP to the same width and does nothing else."""
    names = set(options.layouts or ())
    others = names - {Narrow.word}
    return (
        options.allocation == "uniform"
        and Narrow.word in names
        and all(name in LAYOUTS and LAYOUTS[name].leaves_dense for name in others)
    )


def narrow_to_one_width(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    dense: Plan,
    budget: BudgetConfig,
    solver: Solver,
    statistics: Statistics | None,
) -> list[Narrow]:
    """The edits that narrow every MLP to the largest width within a budget.

    Args:
        model: dense.
        groups: all input groups.
        dense: a plan without edits.
        budget: no rank fraction.
        solver: for the damping.
        statistics: for the forecast; without them only sizes are known.

    Raises:
        BudgetError: the MLPs are not alike, or no width keeps the budget.
    """
    couplings = find_channels(model, groups)
    _require_no_experts(couplings)
    sizes = {one.parts for one in couplings}
    blocks = {group.block for group in groups if group.block is not None}
    if len(sizes) != 1 or {one.group.block for one in couplings} != blocks:
        raise BudgetError(
            f"one width for all blocks needs an MLP of one size in each, and there are {len(couplings)} in {len(blocks)} blocks",
            "leave --allocation uniform or `channels` out",
        )
    channels = sizes.pop()
    step = budget.channel_multiple or step_of(budget.rank_multiple, channels)
    widths = list(range((channels - 1) // step * step, 0, -step))
    losses = _losses(model, couplings, solver, statistics, widths)
    within: list[Narrow] = []
    for width in widths:
        edits = [
            Narrow.of(one, width, solver.damping, None if losses is None else float(losses[one.consumer.name][channels - width]))
            for one in couplings
        ]
        if budget.limits_loss:
            if losses is None:
                raise BudgetError(f"{budget.kind} needs a forecast, and there are no statistics", "give --statistics")
            if sum(edit.predicted_loss or 0.0 for edit in edits) > budget.loss_limit:
                break
            within = edits
        elif _within(edits, dense, budget):
            return edits
    if within:
        return within
    raise BudgetError("no MLP width keeps the budget", "ask for more, or let attention be compressed too (no --for plain)")


def _losses(
    model: PreTrainedModel,
    couplings: Sequence[Coupling],
    solver: Solver,
    statistics: Statistics | None,
    widths: Sequence[int],
) -> dict[str, Sequence[float]] | None:
    if statistics is None:
        return None
    curves = channel_curves(model, couplings, solver, lambda _: [widths[-1]], (statistics, None))
    return {one.consumer.name: curves[narrowing_key(one.consumer.name)] for one in couplings}


def _within(edits: Sequence[Narrow], dense: Plan, budget: BudgetConfig) -> bool:
    left = dense.dense_parameters - sum(edit.saved for edit in edits)
    limit = limit_of(dense, budget, whole=0.0)
    return left * (dense.model.bytes_per_parameter if budget.kind == "max_bytes" else 1) <= limit


def _require_no_experts(couplings: Sequence[Coupling]) -> None:
    mixed = next((layer.name for one in couplings for layer in one.layers if layer.expert is not None), None)
    if mixed is not None:
        raise BudgetError(f"one width for all blocks is not made for experts (`{mixed}`)", "give --exclude '*.experts.*'")
