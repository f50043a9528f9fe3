"""Gates: which of two methods each unit of a plan gets."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from fasc.planning.plan import RankPlan, UnitPlan
from fasc.statistics.moments import Need, Statistics
from fasc.compression.trial import UnitTester
from fasc.planning.options import MethodConfig
from fasc.diagnosis.dependence import group_dependence
from fasc.forecast.half_j import predicted_losses
from fasc.errors import StatisticsError, UsageError
from fasc.linalg.decomposition import Decomposition
from fasc.methods import decompose_unit, get_method
from fasc.progress import progress

Decide = Callable[[UnitPlan, Mapping[str, Decomposition]], tuple[str, float]]
"""(unit, decomposition by method) → the method's name and the score that decided."""


def gate_needs(options: MethodConfig) -> frozenset[Need]:
    """The moments a gate needs beside the method's own, per group."""
    if options.gate == "none":
        return frozenset()
    needs = get_method(options.gate_else).needs | {Need("gradient", "group")}
    return needs | {Need("cross", "group")} if options.gate == "rho" else needs


def gate_plan(
    model: PreTrainedModel,
    statistics: Statistics,
    plan: RankPlan,
    options: MethodConfig,
    tester: Callable[[], UnitTester] | None = None,
) -> RankPlan:
    """Choose for every unit between the plan's method and ``options.gate_else``; the choice is recorded in the unit.

    Args:
        model: dense.
        statistics: with what both methods and the gate need.
        plan: ranks and layouts, which stay.
        options: the method and the gate.
        tester: makes what measures units alone, for the gate ``kl``.

    Raises:
        UsageError: the gate ``kl`` has no held-out text.
        StatisticsError: a moment is missing.
    """
    if options.gate == "none":
        return plan
    if options.gate == "kl" and tester is None:
        raise UsageError("the gate `kl` measures on held-out text and was given none", "use `fasc compress` or `fasc run`")
    other = options.model_copy(update={"name": options.gate_else})
    measured = tester() if tester is not None and options.gate == "kl" else None
    units = []
    with progress(f"gating by {options.gate}", len(plan.units), "units") as advance, torch.no_grad():
        for unit in plan.units:
            units.append(unit if unit.layout == "dense" else _choose(model, statistics, unit, (options, other), measured))
            advance()
    return replace(plan, units=tuple(units))


def _choose(
    model: PreTrainedModel,
    statistics: Statistics,
    unit: UnitPlan,
    pair: tuple[MethodConfig, MethodConfig],
    measured: UnitTester | None,
) -> UnitPlan:
    options, other = pair
    found = {one.name: decompose_unit(model, statistics, unit, one) for one in pair}
    losses = predicted_losses(model, statistics, unit, found)
    if measured is not None:
        nats = {name: measured.measure([(unit, full)]).nats for name, full in found.items()}
        chosen = min(nats, key=lambda name: nats[name])
        note = {"gate": "kl", "score": nats[options.name] - nats[other.name]}
    elif options.gate == "predicted":
        chosen = min(losses, key=lambda name: losses[name])
        note = {"gate": "predicted", "score": losses[options.name] - losses[other.name]}
    else:
        rho = _rho(model, statistics, unit)
        chosen = options.name if rho > options.gate_threshold else other.name
        note = {"gate": "rho", "score": rho}
    return replace(unit, method=chosen, predicted_loss=losses[chosen], gate=note)


def _rho(model: PreTrainedModel, statistics: Statistics, unit: UnitPlan) -> float:
    group = statistics.groups[unit.group]
    found = group_dependence(model, group)
    if found is None:
        raise StatisticsError(
            f"`{unit.group}`: the statistics hold no cross covariance, which ρ needs", "collect again with --gate rho"
        )
    return found.rho
