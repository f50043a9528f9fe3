"""Budget, shapes and forecast → :class:`~fasc.planning.plan.RankPlan`."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from fasc.planning.candidates import Candidates, Choice, Cost, Rules, Way, candidates, unit_of
from fasc.planning.lagrangian import allocate_by_loss
from fasc.planning.plan import ChannelCut, ModelSize, RankPlan, UnitPlan
from fasc.planning.uniform import allocate_uniformly, uniform_share_for_loss
from fasc.statistics.collect import memory_forecast
from fasc.statistics.moments import Need, Scope, Statistics
from fasc.forecast.channels import channel_curves, counts_of, curve_key, cut_key, narrowed_group, removed_parameters
from fasc.paper.selection import gate_needs
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.forecast.half_j import loss_curves
from fasc.errors import BudgetError, StatisticsError, UsageError
from fasc.methods import get_method
from fasc.model.coupling import Channels, find_channels
from fasc.model.checkpoint import header_bytes
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer
from fasc.provenance import digest
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
    found = _cuttable(model, groups) if _may_cut(options, budget) else []
    counts = partial(counts_of, rank_multiple=budget.rank_multiple, channel_multiple=budget.channel_multiple)
    if budget.channel_multiple is not None:
        _check_counts(found, counts, budget.channel_multiple)
    key = (
        f"{options.name} {options.reading} {options.damping} {scopes} {held_out is not None} "
        f"{bool(found)} {budget.rank_multiple} {budget.channel_multiple} {digest(group.name.encode() for group in groups)}"
    )
    if statistics is not None and held_out is not None:
        _check_held_out(statistics, held_out)
    cheap = get_method(options.name).energies is not None and held_out is None
    if statistics is not None and not known.get(key) and (forecast or decides or cheap):
        forecasts = dict(_curves(model, groups, options, scopes, (statistics, held_out), needed=allocation == "fisher"))
        known[key] = forecasts | channel_curves(model, found, options, counts, (statistics, held_out))
    curves = known.get(key, {})
    size = ModelSize(model.num_parameters(), model.dtype.itemsize, header_bytes(model, groups))
    choices = _choices(groups, found, scopes, rules, curves)
    dense = _dense_plan(groups, options, size)
    units, cuts = _fisher(choices, dense, budget) if allocation == "fisher" else (_uniform(choices, dense, budget), [])
    memory = memory_forecast(model, groups, needs_for(options, budget))
    memory |= _memory_to_compress(groups, found, (units, cuts), size)
    return RankPlan(
        method=options.name,
        units=tuple(units),
        model=size,
        allocation=allocation,
        cuts=tuple(cuts),
        budget=budget.model_dump(mode="json", exclude_none=True),
        forecast_memory=memory,
        dense_nll=None if statistics is None else statistics.meta.get("nll"),
    )


_CHOOSING = 10
"""Matrices of the size of an MLP's covariance that choosing its channels holds in float64, workspace of the library among them:
measured with 1,536 and 3,072 channels (docs/log.md)."""


def _memory_to_compress(
    groups: Sequence[InputGroup],
    found: Sequence[Channels],
    made: tuple[Sequence[UnitPlan], Sequence[ChannelCut]],
    size: ModelSize,
) -> dict[str, int]:
    """Bytes that compressing takes beside the dense model and the moments, which stay where they are; by part.

    ``decomposition``: the largest unit in float64, or the MLP with the most channels to choose from. ``channels``: moments of
    what MLPs keep, which replace no file's. ``compressed``: the new weights.
    """
    units, cuts = made
    largest = max((group.d_in * group.d_out + 4 * group.d_in**2 for group in groups), default=0)
    widest = max((_CHOOSING * one.count**2 for one in found), default=0)
    cut = {name for one in cuts for name in one.layers}
    new = [unit for unit in units if unit.layout != "dense" or not cut.isdisjoint(unit.layers)]
    return {
        "decomposition": 8 * max(largest, widest),
        "channels": sum(4 * one.kept**2 for one in cuts),
        "compressed": sum(unit.bytes(size.bytes_per_parameter) for unit in new),
    }


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
        layouts=frozenset(layout for layout in options.layouts if layout != "channels"),
        rank_multiple=budget.rank_multiple,
        channel_multiple=budget.channel_multiple,
        floor=budget.floor,
        overhead=budget.overhead if allocation_of(options, budget) == "fisher" else 0.0,
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


def _may_cut(options: MethodConfig, budget: BudgetConfig) -> bool:
    """Whether MLPs may lose channels: a matter of the whole budget, which a rank fraction and a gate are not."""
    by_loss = allocation_of(options, budget) == "fisher" and budget.kind != "rank_fraction"
    return "channels" in options.layouts and by_loss and options.gate == "none"


def _cuttable(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[Channels]:
    """The MLPs that may lose channels: all but the last block's.

    There a channel speaks for single tokens. When it fires the model is sure, so its gradients are small and the forecast of
    losing it is too low, by a factor of five in the 135M model and without limit on rare tokens (docs/log.md).
    """
    found = find_channels(model, groups)
    last = max((group.block for group in groups if group.block is not None), default=None)
    return [one for one in found if one.group.block != last]


def _check_counts(found: Sequence[Channels], counts: Callable[[int], Sequence[int]], multiple: int) -> None:
    """Raise ``BudgetError`` if the multiple leaves nothing to choose, which would take the layout away without a word."""
    for one in found:
        if not counts(one.count):
            raise BudgetError(
                f"no multiple of {multiple} lies between a quarter of the {one.count:,} channels of `{one.reader.name}` and all",
                "give a smaller --channel-multiple, or leave `channels` out of --layouts",
            )


def _choices(
    groups: Sequence[InputGroup], found: Sequence[Channels], scopes: Sequence[Scope], rules: Rules, curves: Curves
) -> list[Choice]:
    """The ways of every group; the two groups of an MLP that may lose channels are one choice."""
    by_group = {one.group.name: one for one in found}
    readers = {one.reader.name for one in found}
    choices: list[Choice] = []
    for group in groups:
        one = by_group.get(group.name)
        if one is not None:
            choices.append(_mlp_ways(one, scopes, rules, curves))
        elif group.name not in readers:
            choices.append(_ways(group, scopes, rules, curves))
    return choices


def _ways(group: InputGroup, scopes: Sequence[Scope], rules: Rules, curves: Curves, *, uncut: InputGroup | None = None) -> Choice:
    """One projector for the group's layers, or each by itself, as far as either is allowed."""
    dense = {layer.name: layer.parameters for layer in (uncut or group).layers}

    def of(layers: Sequence[Layer]) -> Candidates:
        unit = unit_of(group, layers)
        return candidates(unit, rules, curves.get(unit.unit), uncut=sum(dense[layer.name] for layer in layers))

    alone = len(group.layers) == 1
    shared = [Way((of(group.layers),))] if "group" in scopes and not (alone and "layer" in scopes) else []
    separate = [Way(tuple(of((layer,)) for layer in group.layers))] if "layer" in scopes else []
    return tuple(shared + separate)


def _mlp_ways(channels: Channels, scopes: Sequence[Scope], rules: Rules, curves: Curves) -> Choice:
    """With all channels, and with each number of them that the rules allow."""

    def with_channels(makers: InputGroup, reader: InputGroup, known: Curves, cut: ChannelCut | None) -> list[Way]:
        first = _ways(makers, scopes, rules, known, uncut=channels.group)
        second = _ways(reader, scopes, rules, known, uncut=channels.reader)
        return [Way(a.units + b.units, cut) for a in first for b in second]

    name, count = channels.reader.name, channels.count
    ways = with_channels(channels.group, channels.reader, curves, None)
    for kept in counts_of(count, rules.rank_multiple, rules.channel_multiple):
        if curve_key(name, kept) not in curves or kept < rules.floor * count:
            continue
        cut = ChannelCut(
            reader=channels.reader.layers[0].name,
            makers=tuple(layer.name for layer in channels.makers),
            channels=count,
            kept=kept,
            removed=removed_parameters(channels, kept),
            predicted_loss=float(curves[cut_key(name)][count - kept]),
        )
        narrow = [narrowed_group(group, channels, kept) for group in (channels.group, channels.reader)]
        ways += with_channels(narrow[0], narrow[1], {**curves, name: curves[curve_key(name, kept)]}, cut)
    return tuple(ways)


def _limit(dense: RankPlan, budget: BudgetConfig, choices: Sequence[Choice]) -> float:
    """The budget in the cost of the candidates."""
    if budget.rank_fraction is not None:
        return budget.rank_fraction * _whole(choices)
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


def _whole(choices: Sequence[Choice]) -> float:
    return sum(one.whole for one in _units(choices))


def _units(choices: Sequence[Choice]) -> list[Candidates]:
    """The candidates of the method's own scope, with all channels."""
    return [unit for choice in choices for unit in choice[0].units]


def _uniform(choices: Sequence[Choice], dense: RankPlan, budget: BudgetConfig) -> list[UnitPlan]:
    units = _units(choices)
    if budget.limits_loss:
        if any(unit.losses is None for unit in units):
            raise BudgetError(f"{budget.kind} needs a forecast, and the statistics hold no gradients", "collect them again")
        share = uniform_share_for_loss(units, budget.loss_limit)
    else:
        share = min(1.0, _limit(dense, budget, choices) / _whole(choices))
    return [unit.pick(pick) for unit, pick in zip(units, allocate_uniformly(units, share), strict=True)]


def _fisher(choices: Sequence[Choice], dense: RankPlan, budget: BudgetConfig) -> tuple[list[UnitPlan], list[ChannelCut]]:
    by_loss = budget.limits_loss
    limit = budget.loss_limit if by_loss else _limit(dense, budget, choices)
    found = allocate_by_loss(choices, limit, limited="loss" if by_loss else "cost")
    ways = [choice[which] for choice, (which, _) in zip(choices, found.picks, strict=True)]
    units = [
        unit.pick(index)
        for way, (_, options) in zip(ways, found.picks, strict=True)
        for unit, index in zip(way.units, options, strict=True)
    ]
    return units, [way.cut for way in ways if way.cut is not None]
