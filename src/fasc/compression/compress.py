"""Put low-rank modules where the plan says."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from fasc.planning.plan import RankPlan, UnitPlan
from fasc.statistics.moments import Scope, Statistics
from fasc.compression.trial import options_of
from fasc.forecast.channels import cut_all, cuttings_of
from fasc.layouts.install import finish, install
from fasc.compression.propagate import compress_in_order
from fasc.planning.options import MethodConfig
from fasc.diagnosis.dependence import group_dependence
from fasc.forecast.half_j import half_energies, loss_curve
from fasc.methods import Sketch, decompose_unit, get_method, stacked_weight
from fasc.progress import progress
from fasc.pruning import PRUNINGS


def compress(
    model: PreTrainedModel,
    statistics: Statistics,
    plan: RankPlan,
    options: MethodConfig | None = None,
    *,
    work: Path | None = None,
) -> RankPlan:
    """Compress a model in place, unit by unit: decompose, truncate at the planned rank, replace; or prune it.

    Args:
        model: the dense model that the statistics were measured on.
        statistics: with the moments that the plan's method needs.
        plan: a rank and a layout for every unit.
        options: the method's options; their name must be the plan's method. With ``propagate`` the blocks are compressed in
            order, each from the inputs it gets from the compressed blocks below it.
        work: folder for finished blocks, with ``propagate``: an interrupted compression goes on there.

    Returns:
        The plan with ``predicted_loss`` (½J, nats per token) filled in where the statistics hold the unit's gradients.

    Raises:
        StatisticsError: a moment or a group is missing.
        NonFiniteError: a factor came out as NaN or infinity; names the unit. The model is then partly replaced: reload it.
    """
    options = options or MethodConfig(name=plan.method)
    if plan.method in PRUNINGS:
        statistics.require(PRUNINGS[plan.method].needs)
        PRUNINGS[plan.method].apply(model, statistics, plan)
        return plan
    for unit in plan.units:
        if unit.layout != "dense":
            scope: Scope = "group" if unit.unit == unit.group else "layer"
            statistics.require(get_method(unit.method or plan.method).needs_in((scope,)))
    if options.propagate:
        return compress_in_order(model, statistics, plan, options, work)
    statistics, _, structure = cut_all(model, statistics, cuttings_of(model, statistics, plan.cuts, options.damping))
    losses: dict[str, float] = {}
    with progress(f"compressing with {plan.method}", len(plan.units), "units") as advance, torch.no_grad():
        for unit in plan.units:
            if unit.layout == "dense":
                losses[unit.unit] = 0.0
            else:
                structure.append(_compress_unit(model, statistics, unit, options, losses))
            advance()
    finish(model, structure)
    known = {unit.unit for unit in plan.units if unit.predicted_loss is not None}  # perhaps by moments of held-out text
    return plan.with_predicted_losses({name: loss for name, loss in losses.items() if name not in known})


def _compress_unit(
    model: PreTrainedModel, statistics: Statistics, unit: UnitPlan, options: MethodConfig, losses: dict[str, float]
) -> dict[str, object]:
    chosen = options_of(unit, options)
    method = get_method(chosen.name)
    if chosen.sketch and method.sketch is not None:
        return _compress_sketched(model, statistics, unit, (chosen, method.sketch), losses)
    decomposition = decompose_unit(model, statistics, unit, chosen)
    if unit.unit in statistics.groups[unit.group].gradients:
        losses[unit.unit] = float(loss_curve(model, statistics, unit, chosen.name, decomposition)[unit.rank])
    inputs = statistics.groups[unit.group].input
    factors = decomposition.truncate(unit.rank, inputs.mean.to(decomposition.down))
    return install(model, unit, factors, inputs)


def _compress_sketched(
    model: PreTrainedModel, statistics: Statistics, unit: UnitPlan, how: tuple[MethodConfig, Sketch], losses: dict[str, float]
) -> dict[str, object]:
    """From a sketch, or exactly where it cannot be shown to be good enough; the structure's entry says which, and the bound."""
    options, sketch = how
    weight = stacked_weight(model, statistics, unit)
    group = statistics.groups[unit.group]
    dependence = group_dependence(model, group)
    wide = dependence is not None and dependence.rho > options.gate_threshold
    sketched = sketch(weight, group.unit(unit.unit), options, unit.rank, wide=wide)
    full = sketched.decomposition
    mean = group.input.mean.to(full.down)
    factors = full.truncate(unit.rank, mean, weight.to(full.up) @ mean)
    if sketched.exact and get_method(options.name).is_loss:
        losses[unit.unit] = float(half_energies(full)[unit.rank])
    entry = install(model, unit, factors, group.input)
    note = {"exact": sketched.exact, "lost_estimate": sketched.lost_estimate, "lost_bound": sketched.lost_bound}
    return entry | {"sketch": note}
