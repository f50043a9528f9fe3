"""Zeros where a score is lowest: the same share of every layer, and what that leaves."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasc.planning.candidates import unit_of
from fasc.planning.plan import RankPlan, UnitPlan
from fasc.statistics.moments import GroupStatistics, Moment, Statistics
from fasc.errors import BudgetError
from fasc.model.groups import InputGroup
from fasc.model.layers import weight_of
from fasc.progress import progress
from fasc.pruning._registry import Pruning, register

Score = Callable[[Tensor, GroupStatistics], Tensor]
"""(weight [d_out, d_in] float32, statistics of its group) → the score of each weight; the lowest go."""


def unstructured(
    name: str, *, needs: frozenset[Moment], surrogate: str, reference: str, by_row: bool
) -> Callable[[Score], Score]:
    """Register a score as a pruning method.

    Args:
        name: as given to ``--method``.
        needs: moments beside the covariance of the inputs.
        surrogate: the score as a formula.
        reference: paper.
        by_row: whether scores are compared within an output row or within the whole layer.
    """

    def decorate(score: Score) -> Score:
        def make_plan(model: PreTrainedModel, groups: Sequence[InputGroup], limit: float, multiple: int) -> tuple[UnitPlan, ...]:
            del model, multiple
            return _same_share(groups, limit, by_row=by_row)

        def apply(model: PreTrainedModel, statistics: Statistics, plan: RankPlan) -> None:
            _zero(model, statistics, plan, score, by_row=by_row)

        summary = (score.__doc__ or "").strip().splitlines()[0]
        register(
            Pruning(
                name=name,
                moments=needs,
                structured=False,
                surrogate=surrogate,
                reference=reference,
                summary=summary,
                make_plan=make_plan,
                apply=apply,
            )
        )
        return score

    return decorate


def _same_share(groups: Sequence[InputGroup], limit: float, *, by_row: bool) -> tuple[UnitPlan, ...]:
    """The same share of the weights of every layer; biases are kept and count."""
    units = [unit_of(group, (layer,)) for group in groups for layer in group.layers]
    weights = sum(unit.d_in * unit.d_out for unit in units)
    share = (limit - sum(unit.dense_biases for unit in units)) / weights
    if share <= 0:
        raise BudgetError("the budget leaves no weight", "ask for more")
    share = min(1.0, share)
    plans = []
    for unit in units:
        kept = unit.d_out * int(share * unit.d_in + 1e-9) if by_row else int(share * unit.d_in * unit.d_out + 1e-9)
        plans.append(replace(unit, kept=kept + unit.dense_biases, layout="sparse"))
    return tuple(plans)


def _zero(model: PreTrainedModel, statistics: Statistics, plan: RankPlan, score: Score, *, by_row: bool) -> None:
    with progress(f"pruning with {plan.method}", len(plan.units), "layers") as advance, torch.no_grad():
        for unit in plan.units:
            group = statistics.groups[unit.group]
            layer = next(one for one in group.group.layers if one.name == unit.layers[0])
            weight = weight_of(model, layer)
            scores = score(weight.float(), group)
            kept = unit.parameters - unit.dense_biases
            rows = scores if by_row else scores.flatten()[None]
            lowest = rows.argsort(dim=1, stable=True)[:, : rows.shape[1] - kept // rows.shape[0]]
            mask = torch.ones_like(rows, dtype=torch.bool).scatter_(1, lowest, value=False)
            weight.mul_(mask.view_as(weight))
            advance()
