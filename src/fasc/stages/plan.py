"""Statistics and a budget → a plan."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fasc.compression.trial import Trial
from fasc.edits.structure import require_uncompressed
from fasc.errors import BudgetError, FascError, ModelError
from fasc.evaluation.options import EvaluationConfig
from fasc.forecast.cache import kept_forecasts
from fasc.model.experts import expert_layers, expert_layers_called
from fasc.model.groups import InputGroup, find_groups
from fasc.model.load import LoadedModel, model_fingerprint, model_of_config
from fasc.model.options import LayersConfig
from fasc.options import DType, parse
from fasc.paper.selection import select_methods
from fasc.planning.candidates import Curves
from fasc.planning.correction import Correction, read_correction
from fasc.planning.frontier import MENU, SHARES, Point
from fasc.planning.frontier import frontier as points_of
from fasc.planning.make import plan_model
from fasc.planning.needs import needs_for
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import Plan
from fasc.planning.requirements import Requirements, requirements
from fasc.processes import current
from fasc.provenance import versions
from fasc.recipe import Recipe
from fasc.serving.checkpoint import header_bytes
from fasc.stages.calibrate import held_out_tokens
from fasc.stages.keywords import take
from fasc.statistics.accumulators import FLUSH_TOKENS
from fasc.statistics.moments import Statistics
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.shards import digest_of

_MANY = FLUSH_TOKENS // CalibrationConfig().sequence_length
"""Sequences from which on sums have totals in float64: a text for a large model has as many."""

_SELECTION_SEQUENCES = 8
"""Held-out sequences on which the selection ``kl`` measures each unit."""


def plan(
    model: PreTrainedModel,
    statistics: Statistics | None = None,
    *,
    method: str | MethodConfig = "fasc",
    held_out: Statistics | None = None,
    validation: str | Path | None = None,
    **options: Any,
) -> Plan:
    """The edits that a budget buys. ``print(plan)`` shows them as a table.

    Args:
        model: the dense model.
        statistics: without them only a uniform plan of a fraction can be had, and no forecast.
        method: a registered method, by name or with its options.
        held_out: moments of other text by which the loss is forecast.
        validation: file of ``fasc validate --json``: what plans of this model were measured to lose corrects the forecast.
        **options: one budget (``param_fraction=``, ``max_bytes=``, ``max_kl=``, …) and its options (fields of ``BudgetConfig``);
            fields of ``LayersConfig``; fields of ``MethodConfig`` and the options that the method declares itself.

    Raises:
        UnknownNameError: no such method, or no such option.
        BudgetError: the budget cannot be kept.
        StatisticsError: a moment is missing, or the statistics are of another model.
    """
    budget, layers = take(BudgetConfig, options), take(LayersConfig, options)
    chosen = method.but(**options) if isinstance(method, MethodConfig) else take_method(method, options)
    if statistics is None and chosen.allocation is None and not budget.limits_loss:
        chosen = chosen.but(allocation="uniform")
    with expert_layers(model):
        groups = groups_of(model, statistics, layers)
        correction = None if validation is None else read_correction(validation)
        limit = budget if correction is None else corrected(budget, correction)
        made = make_plan(model, groups, chosen, limit, statistics, held_out=held_out)
        return _selected(model, statistics, expecting(made, budget, correction))


def take_method(name: str, options: dict[str, Any]) -> MethodConfig:
    """A method with its options, from keyword arguments; what the method does not declare is refused when it is looked up."""
    if isinstance(options.get("layouts"), str):
        options["layouts"] = tuple(part.strip() for part in options["layouts"].split(","))
    return parse(MethodConfig, {"name": name, **options}, "method")


def groups_of(model: PreTrainedModel, statistics: Statistics | None, layers: LayersConfig) -> list[InputGroup]:
    """The input groups of the statistics, as far as layers are chosen; found by running the model where there are none."""
    require_uncompressed(model)
    if statistics is None:
        return find_groups(model, layers)
    idle = set(statistics.meta.get("without_gradient", ()))  # nothing can be forecast there: they stay dense
    whole = layers == LayersConfig()
    groups = [group.group for group in statistics.present_in(model).groups.values()] if whole else find_groups(model, layers)
    return [group for group in groups if idle.isdisjoint(layer.name for layer in group.layers)]


def make_plan(  # noqa: PLR0913 - each is a source or a switch of the plan
    model: PreTrainedModel,
    groups: list[InputGroup],
    options: MethodConfig,
    budget: BudgetConfig,
    statistics: Statistics | None,
    *,
    known: dict[str, Curves] | None = None,
    forecast: bool = True,
    held_out: Statistics | None = None,
) -> Plan:
    """:func:`~fasc.planning.make.plan_model` with what a checkpoint's files add."""
    return plan_model(
        model,
        groups,
        options,
        budget,
        statistics,
        known=known,
        forecast=forecast,
        held_out=held_out,
        header_bytes=header_bytes(model, groups, tensors=_tensors(options)),
    )


def _tensors(options: MethodConfig) -> int:
    """That a layer may be stored in beside the one it had: a matrix in one, rounded in four; a bias and an order."""
    if not options.bits:
        return 5
    return 4 if options.layouts is not None and set(options.layouts) <= {"dense", "channels"} else 9


def plan_of_recipe(
    loaded: LoadedModel,
    statistics: Statistics,
    recipe: Recipe,
    known: dict[str, Curves] | None = None,
    held_out: Statistics | None = None,
) -> Plan:
    """The plan of a recipe's first method and budget, with its selection of methods."""
    options, budget = recipe.methods[0], recipe.budgets[0]
    with expert_layers(loaded.model):
        groups = groups_of(loaded.model, statistics, recipe.layers)
        made = make_plan(loaded.model, groups, options, budget, statistics, known=known, forecast=False, held_out=held_out)
        if options.selection == "none":
            return made

        def trial() -> Trial:
            return Trial(loaded.model, statistics, held_out_tokens(loaded, recipe.calibration, _SELECTION_SEQUENCES))

        return select_methods(loaded.model, statistics, made, options, trial)


def _selected(model: PreTrainedModel, statistics: Statistics | None, made: Plan) -> Plan:
    """The plan with its selection of methods, where no held-out text is at hand."""
    if made.options.selection == "none":
        return made
    if statistics is None:
        raise BudgetError(
            f"the selection `{made.options.selection}` needs moments, and there are no statistics", "give --statistics"
        )
    return select_methods(model, statistics, made, made.options)


def plan_from_files(
    loaded: LoadedModel,
    options: MethodConfig,
    budget: BudgetConfig,
    layers: LayersConfig,
    statistics: Path | None,
    held_out: Path | None = None,
    validation: Path | None = None,
) -> Plan:
    """A plan from files of moments; forecasts are kept in the cache, so that another budget takes seconds.

    With a validation of the model, a limit of the KL divergence is one of what is to be expected.
    """
    correction = None if validation is None else read_correction(validation)
    moments = None if statistics is None else stored_statistics(statistics, loaded.model)
    unseen = None if held_out is None else stored_statistics(held_out, loaded.model)
    digests = [None if file is None else digest_of(file) for file in (statistics, held_out)]
    require_same_work(loaded.model, {"statistics": str(digests), "options": f"{options!r} {budget!r} {layers!r}"})
    with expert_layers(loaded.model), kept_forecasts(*digests) as known:
        groups = groups_of(loaded.model, moments, layers)
        limit = budget if correction is None else corrected(budget, correction)
        made = make_plan(loaded.model, groups, options, limit, moments, known=known, held_out=unseen)
        return _selected(loaded.model, moments, expecting(made, budget, correction))


def require_same_work(model: PreTrainedModel, facts: Mapping[str, str]) -> None:
    """See that all processes that share the work were given the same.

    Raises:
        UsageError: they were not; names the fact.
    """
    if current().count > 1:
        current().require_same({**versions(), "model": model_fingerprint(model), **facts})


def plan_of_config(
    spec: str, options: MethodConfig, budget: BudgetConfig, layers: LayersConfig, *, dtype: DType, limit: int
) -> tuple[Plan, Requirements]:
    """A uniform plan from a config alone, and what the run would need in memory.

    Args:
        spec: a hub id, a folder with a config.json, or such a file.
        options: the method and its layouts.
        budget: a fraction.
        layers: which.
        dtype: precision of the weights.
        limit: bytes of memory that there are.

    Raises:
        ModelError: there is no such config.
        BudgetError: the budget needs a forecast.
    """
    model = model_of_config(spec, dtype=dtype)
    require_uncompressed(model)
    with expert_layers_called(model), _sizes_of_a_config(spec):
        groups = find_groups(model, layers)
        made = make_plan(model, groups, options, budget, None)
        needs, batch = needs_for(options, None), EvaluationConfig().batch_tokens
        return made, requirements(model, groups, needs, made, CalibrationConfig(sequences=_MANY), limit, compared_tokens=batch)


@contextmanager
def _sizes_of_a_config(spec: str) -> Iterator[None]:
    """What the body cannot do with a model of a config is a fault of its sizes."""
    try:
        yield
    except FascError:
        raise
    except Exception as problem:
        words = " ".join(str(problem).split())[:200]
        raise ModelError(f"`{spec}` describes no model that runs: {words}", "check the sizes in its config.json") from problem


def corrected(budget: BudgetConfig, correction: Correction) -> BudgetConfig:
    """A limit of the loss to expect, as one of the forecast; other budgets as they are."""
    if not budget.limits_loss:
        return budget
    limit = correction.half_j_of(budget.loss_limit)
    return budget.model_copy(update={"max_kl": limit, "max_perplexity_increase": None})


def expecting(made: Plan, budget: BudgetConfig, correction: Correction | None) -> Plan:
    """The plan with what is to be expected of it, and the budget that was asked for."""
    if correction is None or not made.predicted_loss:
        return made
    asked = budget.model_dump(mode="json", exclude_none=True)
    return replace(made, budget=asked, expected=correction.of(made.predicted_loss))


def frontier(
    model: PreTrainedModel,
    statistics: Statistics,
    *,
    method: str | MethodConfig = "fasc",
    bits: Sequence[int] = MENU,
    shares: Sequence[float] = SHARES,
    **options: Any,
) -> list[Point]:
    """For each of some sizes, what fewer weights, fewer bits and both are forecast to lose.

    Args:
        model: the dense model.
        statistics: measured for these bits.
        method: a registered method whose energies are a loss.
        bits: the menu.
        shares: of the dense bytes, the largest first.
        **options: fields of ``LayersConfig`` and ``MethodConfig``.

    Raises:
        BudgetError: no plan keeps any of the sizes.
        StatisticsError: a moment is missing.
    """
    layers = take(LayersConfig, options)
    chosen = method.but(**options) if isinstance(method, MethodConfig) else take_method(method, options)
    with expert_layers(model):
        groups = groups_of(model, statistics, layers)
        return frontier_of(model, groups, chosen.but(bits=tuple(bits)), statistics, {}, shares)


def frontier_of(
    model: PreTrainedModel,
    groups: list[InputGroup],
    options: MethodConfig,
    statistics: Statistics,
    known: dict[str, Curves],
    shares: Sequence[float] = SHARES,
) -> list[Point]:
    """:func:`~fasc.planning.frontier.frontier` from forecasts that all of its plans share."""
    most = header_bytes(model, groups, tensors=_tensors(options))  # the same for every way

    def make(chosen: MethodConfig, budget: BudgetConfig) -> Plan:
        return plan_model(model, groups, chosen, budget, statistics, known=known, header_bytes=most)

    return points_of(make, options, model.num_parameters() * model.dtype.itemsize, shares)


def frontier_from_files(loaded: LoadedModel, options: MethodConfig, layers: LayersConfig, statistics: Path) -> list[Point]:
    """A frontier from a file of moments; forecasts are kept in the cache."""
    moments = stored_statistics(statistics, loaded.model)
    with expert_layers(loaded.model), kept_forecasts(digest_of(statistics)) as known:
        return frontier_of(loaded.model, groups_of(loaded.model, moments, layers), options, moments, known)


def stored_statistics(file: str | Path, model: PreTrainedModel) -> Statistics:
    """Statistics from a file, checked to be of this model, of the layers that it has now."""
    return fitted_statistics(Statistics.load(Path(file)), model)


def fitted_statistics(statistics: Statistics, model: PreTrainedModel) -> Statistics:
    """Statistics, checked to be of this model, of the layers that it has now.

    Raises:
        StatisticsError: they are of another model.
    """
    statistics.require_model(model_fingerprint(model))
    with expert_layers(model):
        return statistics.present_in(model)
