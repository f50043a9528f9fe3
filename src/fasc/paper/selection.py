"""Method selection: which of two methods each unit of a plan gets. ρ is the paper's selector (arXiv:2601.07197 §2.4)."""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from fasc.compression.trial import Trial
from fasc.diagnosis.dependence import group_dependence
from fasc.edits.factor import Factor, Problem
from fasc.errors import StatisticsError, UsageError
from fasc.forecast.half_j import loss_curve
from fasc.linalg.decomposition import Decomposition
from fasc.methods import AtRank, Solver, get_method, solver
from fasc.model.groups import stacked_weight
from fasc.planning.needs import solver_of
from fasc.planning.options import MethodConfig
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
        StatisticsError: a moment is missing.
    """
    if options.selection == "none":
        return plan
    if options.selection == "kl" and trial is None:
        raise UsageError("the selection `kl` measures on held-out text and was given none", "use `fasc compress` or `fasc run`")
    own, other = solver_of(options), _other(options)
    measured = trial() if trial is not None and options.selection == "kl" else None
    edits = []
    with progress(f"selecting methods by {options.selection}", len(plan.edits), "units") as advance, torch.no_grad():
        for edit in plan.edits:
            edits.append(_select(model, statistics, edit, (own, other), options, measured) if isinstance(edit, Factor) else edit)
            advance()
    return plan.with_edits(edits)


def _other(options: MethodConfig) -> Solver:
    """The other method, with those of the options that it declares as well."""
    declared = get_method(options.selection_else).options.model_fields
    return solver(options.selection_else, {key: value for key, value in options.own.items() if key in declared})


def _select(
    model: PreTrainedModel,
    statistics: Statistics,
    edit: Factor,
    pair: tuple[Solver, Solver],
    options: MethodConfig,
    trial: Trial | None,
) -> Factor:
    own, other = pair
    weight, unit = stacked_weight(model, edit.unit), statistics.unit(edit.unit)
    solutions = {one.name: one.decompose(weight, unit) for one in pair}
    losses = {one.name: float(loss_curve(one, solutions[one.name], weight, unit)[edit.rank]) for one in pair}
    if options.selection == "rho":
        score = _rho(model, statistics, edit.group)
        chosen = own if score > options.selection_threshold else other
    else:
        worth = losses
        if trial is not None:
            problem = Problem(weight, unit)
            worth = {name: _measured(trial, model, edit, problem, full) for name, full in solutions.items()}
        score = worth[own.name] - worth[other.name]
        chosen = own if score <= 0 else other
    return edit.model_copy(
        update={
            "method": chosen.name,
            "options": chosen.options.model_dump(mode="json"),
            "predicted_loss": losses[chosen.name],
            "selection": {"by": options.selection, "score": score, "own": own.name},
        }
    )


def _measured(trial: Trial, model: PreTrainedModel, edit: Factor, problem: Problem, full: Decomposition) -> float:
    return trial.measure([edit], lambda: edit.place(model, problem, AtRank(full))).nats


def _rho(model: PreTrainedModel, statistics: Statistics, group: str) -> float:
    dependence = group_dependence(model, statistics.group(group))
    if dependence is None:
        raise StatisticsError(
            f"`{group}`: the statistics hold no cross covariance, which ρ needs", "measure again with `fasc collect --diagnosis`"
        )
    return dependence.rho
