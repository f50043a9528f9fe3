"""Budget, shapes and forecast → :class:`~fasc.planning.plan.Plan`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from transformers import PreTrainedModel

from fasc.edits import Edit
from fasc.edits.quantise import DAMPING
from fasc.edits.unfuse import with_experts_unfused
from fasc.errors import BudgetError, StatisticsError
from fasc.forecast.attention import attention_curves
from fasc.forecast.channels import channel_curves
from fasc.forecast.enough import too_few_tokens
from fasc.forecast.half_j import loss_curves
from fasc.forecast.noise import noise_curves
from fasc.forecast.rounding import Rounding
from fasc.methods import Solver
from fasc.model.groups import InputGroup, Scope, Unit
from fasc.model.untouched import parameters_outside
from fasc.planning.alternatives import alternatives_of, check_widths, widths_of
from fasc.planning.candidates import Alternative, Candidates, Curves, Rules
from fasc.planning.equal_experts import require_every_expert
from fasc.planning.lagrangian import allocate_by_loss
from fasc.planning.limits import limit_of, multiply_adds_limit
from fasc.planning.memory import memory_to_compress
from fasc.planning.needs import OUTPUT_SCALE, allocation_of, check_bits, may_leave_out, needs_for, rules_of, scopes_of, solver_of
from fasc.planning.one_width import asks_for_one_width, narrow_to_one_width
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import ModelSize, Plan, layers_in
from fasc.planning.pruning import check_pruning, prune
from fasc.planning.removable import Removable, find_removable
from fasc.planning.two_budgets import allocate_within_both
from fasc.planning.uniform import allocate_uniformly, uniform_share_for_loss
from fasc.planning.vocabulary import VocabularyChoices, vocabulary_choices, vocabulary_noises
from fasc.provenance import digest
from fasc.pruning import PRUNINGS
from fasc.statistics.memory import memory_forecast
from fasc.statistics.moments import Statistics


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
    header_bytes: int = 0,
) -> Plan:
    """The edits that a budget buys.

    Args:
        model: the dense model.
        groups: its input groups.
        options: the method, the allocation and the layouts.
        budget: how much is kept, or how much may be lost.
        statistics: without them only a uniform plan can be had, and no forecast.
        known: forecasts of earlier calls on the same statistics, which this one adds to.
        forecast: fill in the predicted losses even where the ranks do not depend on them and they take whole decompositions;
            compressing fills them in from the decompositions it makes anyway.
        held_out: moments of text that did not calibrate; the loss is then forecast on it. A subspace looks better on the tokens
            that chose it than on others.
        header_bytes: what a checkpoint's file headers add.

    Raises:
        UnknownNameError: no such method.
        BudgetError: the budget cannot be kept, or needs a forecast that cannot be had.
        StatisticsError: the statistics lack a moment or a group.
    """
    size = ModelSize(parameters=model.num_parameters(), bytes_per_parameter=model.dtype.itemsize, header_bytes=header_bytes)
    layers = layers_in(groups)
    outside = parameters_outside(model, [layer.name for layer in layers])
    asked = budget.model_dump(mode="json", exclude_none=True)
    few = None if statistics is None or held_out is not None else too_few_tokens(groups, statistics)
    dense = Plan(options, (), layers, size, budget=asked, outside=outside, caution=few)
    if options.name in PRUNINGS:
        return _plan_pruning(model, groups, options, budget, replace(dense, caution=None))
    chosen, allocation = solver_of(options), allocation_of(options, budget)
    check_bits(options, budget)
    decides = allocation == "fisher" or budget.limits_loss  # whether ranks depend on the forecast
    if statistics is None and decides:
        raise BudgetError(
            f"allocation `{allocation}` under {budget.kind} needs the forecast of the loss, and there are no statistics",
            "give --statistics (from `fasc collect`), or ask for --allocation uniform and a fraction",
        )
    if asks_for_one_width(options):
        narrowed = narrow_to_one_width(model, groups, dense, budget, chosen, statistics)
        return replace(dense, edits=tuple(narrowed), forecast_memory=memory_forecast(model, groups, needs_for(options, budget)))
    removable = _removable(model, groups, options, budget)
    scopes, rules = scopes_of(options, budget), rules_of(options, budget, bytes_per_parameter=size.bytes_per_parameter)
    curves: Curves = {}
    cheap = chosen.method.energies is not None and held_out is None
    if statistics is not None and (forecast or decides or cheap):
        known = {} if known is None else known
        key = _key(chosen, scopes, removable, budget, groups, held_out)
        if not known.get(key):
            known[key] = _forecasts(
                model, groups, removable, chosen, scopes, budget, (statistics, held_out), needed=allocation == "fisher"
            )
        curves = known[key]
        if options.bits:
            curves = {**curves, **_noises(model, groups, (chosen, scopes, rules), options, statistics, known)}
    choices = alternatives_of(groups, removable, scopes, rules, curves, chosen.damping)
    if allocation == "fisher":
        ends = _ends(model, options, rules, statistics, known)
        edits = _globally([*choices, *ends.choices], dense, budget, chosen, ends.parameters)
    else:
        edits = _uniformly(choices, dense, budget, chosen)
    edits = with_experts_unfused(model, edits)
    memory = memory_forecast(model, groups, needs_for(options, budget))
    memory |= memory_to_compress(groups, removable.channels, edits, size)
    nll = None if statistics is None else statistics.meta.get("nll")
    lacking = tuple(removable.lacking())
    return replace(dense, edits=tuple(edits), allocation=allocation, forecast_memory=memory, dense_nll=nll, lacking=lacking)


def _removable(model: PreTrainedModel, groups: Sequence[InputGroup], options: MethodConfig, budget: BudgetConfig) -> Removable:
    removable = find_removable(model, groups, may_leave_out(options, budget))
    if budget.equal_experts:
        require_every_expert(model, removable.channels)
    return removable


def _noises(
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    how: tuple[Solver, Sequence[Scope], Rules],
    options: MethodConfig,
    statistics: Statistics,
    known: dict[str, Curves],
) -> Curves:
    """What rounding every unit in every layout costs."""
    chosen, scopes, rules = how
    names = ",".join(layout.name for layout in rules.layouts)
    own = f"{chosen.name} {chosen.options.model_dump_json()}"
    key = f"rounding {own} {tuple(scopes)} {names} {options.bits_group} {digest(group.name.encode() for group in groups)}"
    if not known.get(key):
        statistics.require(frozenset({OUTPUT_SCALE}))
        units = {unit.name: unit for group in groups for scope in scopes for unit in group.units(scope)}
        rounding = Rounding(options.bits_group, DAMPING)
        known[key] = noise_curves(model, statistics, chosen, list(units.values()), rules.layouts, rounding)
    return known[key]


def _key(
    chosen: Solver,
    scopes: Sequence[Scope],
    removable: Removable,
    budget: BudgetConfig,
    groups: Sequence[InputGroup],
    held_out: Statistics | None,
) -> str:
    """Names the forecasts of a method: whatever they depend on beside the statistics."""
    return (
        f"{chosen.name} {chosen.options.model_dump_json()} {tuple(scopes)} {held_out is not None} "
        f"{sorted(removable.words)} "
        f"{budget.rank_multiple} {budget.channel_multiple} {digest(group.name.encode() for group in groups)}"
    )


def _forecasts(  # noqa: PLR0913 - what the forecasts depend on
    model: PreTrainedModel,
    groups: Sequence[InputGroup],
    removable: Removable,
    chosen: Solver,
    scopes: Sequence[Scope],
    budget: BudgetConfig,
    moments: tuple[Statistics, Statistics | None],
    *,
    needed: bool,
) -> Curves:
    """½J of every unit that may be used, and of channel pruning; empty if there are no gradients and none are needed."""
    statistics, held_out = moments
    if held_out is not None:
        _check_held_out(statistics, held_out)
    widths = partial(widths_of, rank_multiple=budget.rank_multiple, channel_multiple=budget.channel_multiple)
    if budget.channel_multiple is not None:
        check_widths(removable.channels, widths, budget.channel_multiple)
    units: dict[str, Unit] = {}
    for group in groups:
        for scope in scopes:
            units |= {unit.name: unit for unit in group.units(scope)}
    statistics.require(chosen.method.needs_in(scopes))
    measured = {name for group in statistics.groups.values() for name in group.gradients}
    absent = [name for name in units if name not in measured]
    if absent and needed:
        raise StatisticsError(f"the statistics hold no gradient moment of `{absent[0]}`", "collect again for this method")
    if absent:
        return {}
    curves = loss_curves(model, statistics, chosen, list(units.values()), held_out=held_out)
    curves |= channel_curves(model, removable.channels, chosen, widths, moments)
    return curves | attention_curves(model, removable.attentions, chosen.damping, moments, removable.words)


def _check_held_out(statistics: Statistics, held_out: Statistics) -> None:
    """Raise ``StatisticsError`` unless the held-out moments are of the same model and of other tokens."""
    held_out.require_model(statistics.meta["model_fingerprint"])
    if held_out.meta["token_digest"] == statistics.meta["token_digest"]:
        raise StatisticsError(
            "the held-out statistics were measured on the very tokens that calibrate", "measure others: `fasc collect --skip`"
        )


def _plan_pruning(
    model: PreTrainedModel, groups: Sequence[InputGroup], options: MethodConfig, budget: BudgetConfig, dense: Plan
) -> Plan:
    pruning = PRUNINGS[options.name]
    check_pruning(pruning, options, budget)
    limit = limit_of(dense, budget, whole=0.0)
    if budget.kind == "max_bytes":
        limit /= dense.model.bytes_per_parameter
    edits = prune(model, groups, pruning, min(limit, float(dense.dense_parameters)), budget.rank_multiple)
    memory = memory_forecast(model, groups, pruning.needs)
    return replace(dense, edits=edits, forecast_memory=memory)


Choices = Sequence[Sequence[Alternative]]


def _uniformly(choices: Choices, dense: Plan, budget: BudgetConfig, chosen: Solver) -> list[Edit]:
    units = _own_units(choices)
    if budget.limits_loss:
        if any(unit.losses is None for unit in units):
            raise BudgetError(f"{budget.kind} needs a forecast, and the statistics hold no gradients", "collect them again")
        share = uniform_share_for_loss(units, budget.loss_limit)
    else:
        free = _whole([unit for unit in units if len(unit.costs) > 1])
        fixed = sum(float(unit.costs[0]) for unit in units if len(unit.costs) == 1)
        whole = limit_of(dense, budget, whole=free + fixed)
        if free == 0 and whole < fixed:
            raise BudgetError(
                f"a fraction of {whole / fixed:g} leaves no direction: no chosen layer can be stored with fewer parameters",
                "allow another layout than dense, or choose other layers",
            )
        limit = whole - (0.0 if budget.kind == "rank_fraction" else fixed)
        share = 1.0 if free == 0 else min(1.0, limit / (free if budget.kind != "rank_fraction" else free + fixed))
    return [
        edit for unit, index in zip(units, allocate_uniformly(units, share), strict=True) for edit in unit.edits(index, chosen)
    ]


def _ends(
    model: PreTrainedModel,
    options: MethodConfig,
    rules: Rules,
    statistics: Statistics | None,
    known: dict[str, Curves] | None,
) -> VocabularyChoices:
    """Bits of embedding and head, where they are asked for."""
    if not options.bits_vocabulary or statistics is None:
        return VocabularyChoices()
    known, key = {} if known is None else known, f"vocabulary {rules.bits_group}"
    if not known.get(key):
        known[key] = vocabulary_noises(model, statistics, rules.bits_group)
    return vocabulary_choices(model, statistics, rules, known[key])


def _globally(choices: Choices, dense: Plan, budget: BudgetConfig, chosen: Solver, also: int) -> list[Edit]:
    by_loss = budget.limits_loss
    limit = budget.loss_limit if by_loss else limit_of(dense, budget, whole=_whole(_own_units(choices)), also=also)
    if budget.flop_fraction is not None and budget.kind != "flop_fraction":
        allocation = allocate_within_both(choices, limit, multiply_adds_limit(dense, budget.flop_fraction))
    else:
        allocation = allocate_by_loss(choices, limit, limited="loss" if by_loss else "cost")
    edits: list[Edit] = []
    for alternatives, (which, options) in zip(choices, allocation.picks, strict=True):
        alternative = alternatives[which]
        edits += alternative.before
        for unit, index in zip(alternative.units, options, strict=True):
            edits += unit.edits(index, chosen)
    return edits


def _own_units(choices: Choices) -> list[Candidates]:
    """The candidates of the method's own scope, with all channels."""
    return [unit for alternatives in choices for unit in alternatives[0].units]


def _whole(units: Sequence[Candidates]) -> float:
    return sum(unit.whole for unit in units)
