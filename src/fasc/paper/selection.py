"""Method selection: which of two methods each unit of a plan gets. ρ is the paper's selector (arXiv:2601.07197 §2.4)."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import torch
from transformers import PreTrainedModel

from fasc.compression.trial import Trial
from fasc.diagnosis.dependence import group_dependence
from fasc.edits import Edit
from fasc.edits.factor import Factor, Problem
from fasc.errors import BudgetError, StatisticsError, UsageError
from fasc.forecast.half_j import loss_curve
from fasc.linalg.decomposition import Decomposition
from fasc.methods import AtRank, Solver, get_method, solver
from fasc.model.groups import stacked_weight
from fasc.planning.needs import NOTHING, solver_of
from fasc.planning.options import BY_RHO, MethodConfig
from fasc.planning.plan import Plan
from fasc.progress import progress
from fasc.statistics.moments import Statistics


def select_methods(
    model: PreTrainedModel,
    statistics: Statistics,
    plan: Plan,
    options: MethodConfig,
    trial: Callable[[], Trial] | None = None,
) -> Plan:
    """Choose for every unit between the plan's method and ``options.selection_else``; the choice is recorded in the edit.

    Args:
        model: dense.
        statistics: with what both methods and the selection need.
        plan: ranks and layouts, which stay.
        options: the method and the selection.
        trial: makes what measures units alone, for the selection ``kl``.

    Raises:
        UsageError: the selection ``kl`` has no held-out text.
        BudgetError: nothing is selected, and the rest stays as it is.
        StatisticsError: a moment is missing.
    """
    if options.selection == "none":
        return plan
    if options.selection == "kl" and trial is None:
        raise UsageError("the selection `kl` measures on held-out text and was given none", "use `fasc compress` or `fasc run`")
    chosen = [edit for edit in plan.edits if isinstance(edit, Factor)]
    scores = {edit.unit: _rho(model, statistics, edit.group) for edit in chosen} if options.selection in BY_RHO else {}
    threshold = _threshold(list(scores.values()), options)
    own, other = solver_of(options), None if options.selection_else == NOTHING else _other(options)
    measured = trial() if trial is not None and options.selection == "kl" else None
    why = {"by": options.selection, "own": own.name}
    edits: list[Edit] = []
    with progress(f"selecting methods by {options.selection}", len(plan.edits), "units") as advance, torch.no_grad():
        for edit in plan.edits:
            if not isinstance(edit, Factor):
                edits.append(edit)
            elif options.selection in BY_RHO:
                score = scores[edit.unit]
                picked = own if (score > threshold) == (options.selection == "rho") else other
                edits += (
                    []
                    if picked is None
                    else [_with(edit, picked, _loss(model, statistics, edit, picked), {"score": score, **why})]
                )
            else:
                assert other is not None  # noqa: S101 - a comparison of losses has two methods (selection_needs)
                edits.append(_better(model, statistics, edit, (own, other), measured, why))
            advance()
    if chosen and not any(isinstance(edit, Factor) for edit in edits):
        raise BudgetError(
            f"no unit has a ρ on the asked side of {threshold:.3g}, and none would be compressed",
            f"theirs are {min(scores.values()):.3g} to {max(scores.values()):.3g}",
        )
    return plan.with_edits(edits)


def _threshold(scores: Sequence[float], options: MethodConfig) -> float:
    """The ρ above which units count as high; with a share, the one that so many of them are on the right side of."""
    share = options.selection_share
    if share is None or not scores:
        return options.selection_threshold
    ordered, count = sorted(scores), max(1, round(share * len(scores)))
    if options.selection == "rho":
        return -inf if count == len(ordered) else ordered[-count - 1]
    return ordered[count - 1]


def _other(options: MethodConfig) -> Solver:
    """The other method, with those of the options that it declares as well."""
    declared = get_method(options.selection_else).options.model_fields
    return solver(options.selection_else, {key: value for key, value in options.own.items() if key in declared})


def _better(
    model: PreTrainedModel,
    statistics: Statistics,
    edit: Factor,
    pair: tuple[Solver, Solver],
    trial: Trial | None,
    why: dict[str, Any],
) -> Factor:
    """The method with the lower forecast loss, or with a trial the lower measured one."""
    own, other = pair
    weight, unit = stacked_weight(model, edit.unit), statistics.unit(edit.unit)
    solutions = {one.name: one.decompose(weight, unit) for one in pair}
    losses = {one.name: float(loss_curve(one, solutions[one.name], weight, unit)[edit.rank]) for one in pair}
    worth = losses
    if trial is not None:
        problem = Problem(weight, unit)
        worth = {name: _measured(trial, model, edit, problem, full) for name, full in solutions.items()}
    score = worth[own.name] - worth[other.name]
    chosen = own if score <= 0 else other
    return _with(edit, chosen, losses[chosen.name], {"score": score, **why})


def _with(edit: Factor, method: Solver, loss: float, why: dict[str, Any]) -> Factor:
    options = method.options.model_dump(mode="json")
    return edit.model_copy(update={"method": method.name, "options": options, "predicted_loss": loss, "selection": why})


def _loss(model: PreTrainedModel, statistics: Statistics, edit: Factor, method: Solver) -> float:
    weight, unit = stacked_weight(model, edit.unit), statistics.unit(edit.unit)
    return float(loss_curve(method, method.decompose(weight, unit), weight, unit)[edit.rank])


def _measured(trial: Trial, model: PreTrainedModel, edit: Factor, problem: Problem, full: Decomposition) -> float:
    return trial.measure([edit], lambda: edit.place(model, problem, AtRank(full))).nats


def _rho(model: PreTrainedModel, statistics: Statistics, group: str) -> float:
    dependence = group_dependence(model, statistics.group(group))
    if dependence is None:
        raise StatisticsError(
            f"`{group}`: the statistics hold no cross covariance, which ρ needs", "measure again with `fasc collect --diagnosis`"
        )
    return dependence.rho
