"""Budget, shapes and forecast → :class:`~fasc.budget.plan.RankPlan`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from fasc.budget.candidates import Candidates, Cost, GroupCandidates, Rules, candidates, unit_of
from fasc.budget.fisher import allocate_by_loss
from fasc.budget.plan import ModelSize, RankPlan, UnitPlan
from fasc.budget.uniform import allocate_uniformly, uniform_share_for_loss
from fasc.calibration.collect import memory_forecast
from fasc.calibration.statistics import Need, Scope, Statistics
from fasc.compression.gates import gate_needs
from fasc.config import BudgetConfig, MethodConfig
from fasc.diagnosis.forecast import loss_curves
from fasc.errors import BudgetError, StatisticsError, UsageError
from fasc.methods import get_method
from fasc.model.checkpoint import header_bytes
from fasc.model.groups import InputGroup
from fasc.pruning import PRUNINGS, Pruning, find_method

Curves = Mapping[str, NDArray[np.float64]]

_COSTS: Mapping[str, Cost] = {"rank_fraction": "rank", "max_bytes": "bytes"}


def allocation_of(options: MethodConfig, budget: BudgetConfig) -> str:
    """The allocation that was asked for, or the default: see ``MethodConfig.allocation``.

    Raises:
        BudgetError: a global allocation is asked for energies that do not share a unit across layers.
    """
    method = get_method(options.name)
    if options.allocation == "fisher" and not method.is_loss:
        raise BudgetError(
            f"allocation `fisher` compares energies across layers, and those of `{method.name}` are in {method.energy_unit}, "
            "which differs from layer to layer",
            "use --allocation uniform, or a method whose energies are a loss in nats²: fasc, two-sided",
        )
    if options.allocation is not None:
        return options.allocation
    return "fisher" if method.is_loss and budget.kind != "rank_fraction" else "uniform"


def scopes_of(options: MethodConfig, budget: BudgetConfig) -> tuple[Scope, ...]:
    """Whether the plan may use projectors of whole groups, of single layers, or both; the method's own scope first."""
    method = get_method(options.name)
    rules = _rules(options, budget, bytes_per_parameter=4)
    only = method.scopes[0] if len(method.scopes) == 1 else None
    allowed = tuple(scope for scope in method.scopes if rules.allows(scope, only))
    return allowed if allocation_of(options, budget) == "fisher" and budget.kind != "rank_fraction" else allowed[:1]


def needs_for(options: MethodConfig, budget: BudgetConfig | None) -> frozenset[Need]:
    """The moments that planning and compressing with a method under a budget need; without one, whatever any budget may need.

    Raises:
        UsageError, BudgetError: pruning cannot do what is asked.
    """
    found = find_method(options.name)
    if isinstance(found, Pruning):
        if budget is not None:
            _check_pruning(found, options, budget)
        return found.needs
    if budget is None:
        return found.needs_in(found.scopes)
    method = found
    needs = method.needs_in(scopes_of(options, budget))
    if budget.limits_loss:
        needs |= frozenset(Need("gradient", scope) for scope in scopes_of(options, budget))
    return needs | gate_needs(options)


def plan_model(  # noqa: PLR0913 - each is a source or a switch of the plan
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    options: MethodConfig,
    budget: BudgetConfig,
    statistics: Statistics | None = None,
    *,
    known: dict[str, Curves] | None = None,
    forecast: bool = True,
    held_out: Statistics | None = None,
) -> RankPlan:
    """A rank and a layout for every unit of the model.

    Args:
        model: the dense model.
        groups: its input groups.
        options: the method, the allocation and the layouts.
        budget: how much is kept, or how much may be lost.
        statistics: without them only a uniform plan can be had, and no forecast.
        known: forecasts of earlier calls on the same statistics, which this one adds to.
        forecast: fill in the predicted losses even where the ranks do not depend on them and they take whole decompositions;
            ``compress`` fills them in from the decompositions it makes anyway.
        held_out: moments of text that did not calibrate; the loss is then forecast on it. A subspace looks better on the tokens
            that chose it than on others.

    Raises:
        UnknownNameError: no such method.
        BudgetError: the budget cannot be kept, or needs a forecast that cannot be had.
        StatisticsError: the statistics lack a moment or a group.
    """
    if options.name in PRUNINGS:
        return _plan_pruning(model, groups, options, budget)
    allocation = allocation_of(options, budget)
    scopes = scopes_of(options, budget)
    rules = _rules(options, budget, bytes_per_parameter=model.dtype.itemsize)
    decides = allocation == "fisher" or budget.limits_loss  # whether ranks depend on the forecast
    if statistics is None and decides:
        raise BudgetError(
            f"allocation `{allocation}` under {budget.kind} needs the forecast of the loss, and there are no statistics",
            "give --statistics (from `fasc collect`), or ask for --allocation uniform and a fraction",
        )
    known = {} if known is None else known
    key = f"{options.name} {options.reading} {options.damping} {scopes} {held_out is not None}"
    if statistics is not None and held_out is not None:
        _check_held_out(statistics, held_out)
    cheap = get_method(options.name).energies is not None and held_out is None
    if statistics is not None and not known.get(key) and (forecast or decides or cheap):
        known[key] = _curves(model, groups, options, scopes, (statistics, held_out), needed=allocation == "fisher")
    curves = known.get(key, {})
    size = ModelSize(model.num_parameters(), model.dtype.itemsize, header_bytes(model, groups))
    menus = [_menu(group, scopes, rules, curves) for group in groups]
    dense = _dense_plan(groups, options, size)
    units = _fisher(menus, dense, budget) if allocation == "fisher" else _uniform(menus, dense, budget)
    return RankPlan(
        method=options.name,
        units=tuple(units),
        model=size,
        allocation=allocation,
        budget=budget.model_dump(mode="json", exclude_none=True),
        forecast_memory=memory_forecast(model, groups, needs_for(options, budget)),
        dense_nll=None if statistics is None else statistics.meta.get("nll"),
    )


def _check_pruning(pruning: Pruning, options: MethodConfig, budget: BudgetConfig) -> None:
    """Raise ``UsageError`` or ``BudgetError`` if pruning has no answer to what is asked."""
    if options.propagate or options.gate != "none" or options.allocation == "fisher":
        raise UsageError(
            f"`{options.name}` prunes and finds no subspaces: it takes no --propagate, no --gate and no --allocation fisher",
            "leave them out, or use a subspace method such as fasc",
        )
    possible = ("param_fraction", "model_fraction", *(("max_bytes",) if pruning.structured else ()))
    if budget.kind not in possible:
        why = (
            "it has no rank and no forecast" if pruning.structured else "it has no rank and no forecast, and its zeros are stored"
        )
        raise BudgetError(
            f"`{options.name}` cannot keep {budget.kind}: {why}",
            f"ask for {' or '.join('--' + name.replace('_', '-') for name in possible)}",
        )


def _plan_pruning(model: PreTrainedModel, groups: Sequence[InputGroup], options: MethodConfig, budget: BudgetConfig) -> RankPlan:
    pruning = PRUNINGS[options.name]
    _check_pruning(pruning, options, budget)
    size = ModelSize(model.num_parameters(), model.dtype.itemsize, header_bytes(model, groups))
    dense = _dense_plan(groups, options, size)
    limit = _limit(dense, budget, ())
    if budget.kind == "max_bytes":
        limit /= model.dtype.itemsize
    units = pruning.make_plan(model, groups, min(limit, float(dense.dense_parameters)), budget.rank_multiple)
    return replace(
        dense,
        units=units,
        budget=budget.model_dump(mode="json", exclude_none=True),
        forecast_memory=memory_forecast(model, groups, pruning.needs),
    )


def _dense_plan(groups: Sequence[InputGroup], options: MethodConfig, size: ModelSize) -> RankPlan:
    return RankPlan(options.name, tuple(unit_of(group, group.layers) for group in groups), size)


def _rules(options: MethodConfig, budget: BudgetConfig, *, bytes_per_parameter: int) -> Rules:
    return Rules(
        layouts=frozenset(options.layouts),
        rank_multiple=budget.rank_multiple,
        floor=budget.floor,
        min_saving=budget.min_saving if get_method(options.name).is_loss and allocation_of(options, budget) == "fisher" else 0.0,
        cost=_COSTS.get(budget.kind, "parameters"),
        bytes_per_parameter=bytes_per_parameter,
    )


def _curves(
    model: PreTrainedModel,
    groups: Iterable[InputGroup],
    options: MethodConfig,
    scopes: Sequence[Scope],
    moments: tuple[Statistics, Statistics | None],
    *,
    needed: bool,
) -> Curves:
    """½J of every unit that may be used; empty if the statistics have no gradients and none are needed."""
    statistics, held_out = moments
    units: dict[str, UnitPlan] = {}
    for group in groups:
        for scope in scopes:
            units |= {one.unit: one for one in (unit_of(group, layers) for layers in group.parts(scope))}
    statistics.require(get_method(options.name).needs_in(scopes))
    known = {name for group in statistics.groups.values() for name in group.gradients}
    absent = [name for name in units if name not in known]
    if absent and needed:
        raise StatisticsError(f"the statistics hold no gradient moment of `{absent[0]}`", "collect again for this method")
    return {} if absent else loss_curves(model, statistics, options, list(units.values()), held_out=held_out)


def _check_held_out(statistics: Statistics, held_out: Statistics) -> None:
    """Raise ``StatisticsError`` unless the held-out moments are of the same model and of other tokens."""
    held_out.require_model(statistics.meta["model_fingerprint"])
    if held_out.meta["token_digest"] == statistics.meta["token_digest"]:
        raise StatisticsError(
            "the held-out statistics were measured on the very tokens that calibrate", "measure others: `fasc collect --skip`"
        )


def _menu(group: InputGroup, scopes: Sequence[Scope], rules: Rules, curves: Curves) -> GroupCandidates:
    def of(layers: Sequence[object]) -> Candidates:
        unit = unit_of(group, layers)  # type: ignore[arg-type]
        return candidates(unit, rules, curves.get(unit.unit))

    alone = len(group.layers) == 1
    shared = of(group.layers) if "group" in scopes and not (alone and "layer" in scopes) else None
    return GroupCandidates(shared, tuple(of((layer,)) for layer in group.layers) if "layer" in scopes else ())


def _limit(dense: RankPlan, budget: BudgetConfig, menus: Sequence[GroupCandidates]) -> float:
    """The budget in the cost of the candidates."""
    if budget.rank_fraction is not None:
        return budget.rank_fraction * _whole(menus)
    if budget.param_fraction is not None:
        return budget.param_fraction * dense.dense_parameters
    outside = dense.model.parameters - dense.dense_parameters
    if budget.model_fraction is not None:
        limit = budget.model_fraction * dense.model.parameters - outside
        what = f"model_fraction {budget.model_fraction:g}"
    else:
        limit = float(budget.bytes_limit - dense.model.header_bytes - outside * dense.model.bytes_per_parameter)
        what = f"max_bytes {budget.max_bytes}"
    if limit <= 0:
        share = outside / dense.model.parameters
        raise BudgetError(
            f"{what} leaves nothing for the compressed layers: what is never compressed (embeddings, norms, head) is "
            f"{share:.1%} of the model, {outside * dense.model.bytes_per_parameter / 1e6:,.1f} MB",
            f"ask for more than {share:.3f} of the model",
        )
    return limit


def _whole(menus: Sequence[GroupCandidates]) -> float:
    return sum(one.whole for one in _units(menus))


def _units(menus: Sequence[GroupCandidates]) -> list[Candidates]:
    """The candidates of the method's own scope."""
    return [one for menu in menus for one in ((menu.shared,) if menu.shared is not None else menu.separate)]


def _uniform(menus: Sequence[GroupCandidates], dense: RankPlan, budget: BudgetConfig) -> list[UnitPlan]:
    units = _units(menus)
    if budget.limits_loss:
        if any(unit.losses is None for unit in units):
            raise BudgetError(f"{budget.kind} needs a forecast, and the statistics hold no gradients", "collect them again")
        share = uniform_share_for_loss(units, budget.loss_limit)
    else:
        share = min(1.0, _limit(dense, budget, menus) / _whole(menus))
    return [unit.pick(pick) for unit, pick in zip(units, allocate_uniformly(units, share), strict=True)]


def _fisher(menus: Sequence[GroupCandidates], dense: RankPlan, budget: BudgetConfig) -> list[UnitPlan]:
    by_loss = budget.limits_loss
    limit = budget.loss_limit if by_loss else _limit(dense, budget, menus)
    found = allocate_by_loss(menus, limit, limited="loss" if by_loss else "cost")
    units = []
    for menu, (shared, separate) in zip(menus, found.picks, strict=True):
        if shared is not None and menu.shared is not None:
            units.append(menu.shared.pick(shared))
        else:
            units += [one.pick(index) for one, index in zip(menu.separate, separate, strict=True)]
    return units
