"""Statistics → diagnosis, validation, overlaps of subspaces."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from fasc.diagnosis.curvature import compare_with_hessian
from fasc.diagnosis.dependence import DEPENDENCE_NEEDS, group_dependence
from fasc.diagnosis.diagnose import Diagnosis, diagnosis_needs
from fasc.diagnosis.diagnose import diagnose as diagnose_groups
from fasc.diagnosis.overlap import compare_subspaces, reading_bases, summarise_overlaps
from fasc.diagnosis.validate import Part, held_out_moments, summarise, validate_plans
from fasc.diagnosis.validate import validate as validate_groups
from fasc.edits import layers_of, require_layers
from fasc.errors import UsageError
from fasc.evaluation.evaluate import Record
from fasc.evaluation.evaluate import evaluate as score
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcomes
from fasc.evaluation.paired import paired
from fasc.evaluation.registry import get_benchmark
from fasc.forecast.enough import too_few_tokens
from fasc.model.experts import expert_layers
from fasc.model.load import LoadedModel
from fasc.model.options import LayersConfig
from fasc.paper.exclusions import excluded
from fasc.planning.needs import solver_of
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import Plan
from fasc.progress import say
from fasc.stages.calibrate import calibrate, held_out_tokens
from fasc.stages.compress import needs_of
from fasc.stages.keywords import Names, names_in
from fasc.stages.plan import stored_statistics
from fasc.statistics.moments import Need, Statistics
from fasc.statistics.options import CalibrationConfig

Exclusions = Literal["paper", "none"]


def diagnose(
    model: PreTrainedModel,
    statistics: Statistics,
    methods: Names = "fasc,svd",
    *,
    rank_fraction: float = 0.5,
    exclusions: Exclusions = "paper",
    plan: Plan | None = None,
) -> Diagnosis:
    """Spectra of the moments, ρ, and each method's energies and forecast, for every input group.

    Args:
        model: the dense model that the statistics were measured on.
        statistics: with the moments that the methods need; cross moments and sketches (``needs=diagnosis_needs(…)``) add ρ.
        methods: whose energies to look at.
        rank_fraction: ½J and angles are given at it.
        exclusions: which groups are marked as excluded.
        plan: what it makes of each expert stands beside what was found of it.

    Raises:
        StatisticsError: a method's moments are missing.
        ModelError: the plan is of another model.
    """
    chosen = [MethodConfig(name=name) for name in names_in(methods)]
    exclude = excluded if exclusions == "paper" else None
    with expert_layers(model):
        if plan is not None:
            require_layers(plan.layers, layers_of(model), "the plan")
        return diagnose_groups(model, statistics, chosen, rank_fraction=rank_fraction, exclude=exclude, plan=plan)


def diagnose_model(
    loaded: LoadedModel,
    methods: Sequence[MethodConfig],
    *,
    rank_fraction: float,
    exclusions: Exclusions,
    statistics: Path | None,
    calibration: CalibrationConfig,
    plan: Plan | None = None,
) -> Diagnosis:
    """Measure what is needed, unless a file holds it, and diagnose; every expert of a mixture has rows of its own."""
    exclude = excluded if exclusions == "paper" else None
    with expert_layers(loaded.model):
        if plan is not None:
            require_layers(plan.layers, layers_of(loaded.model), "the plan")
        needs = diagnosis_needs(methods)
        moments = measured_or_stored(loaded, statistics, needs, calibration, LayersConfig())
        _say_what_lacks(moments, needs)
        return diagnose_groups(loaded.model, moments, methods, rank_fraction=rank_fraction, exclude=exclude, plan=plan)


def _say_what_lacks(moments: Statistics, needs: frozenset[Need]) -> None:
    """Before a long diagnosis: what it will not tell, and what is not to be trusted of it."""
    if absent := sorted({need.moment for need in needs} - {str(moment) for moment, _ in moments.meta["needs"]}):
        say(
            f"the statistics hold no {', '.join(absent)}: what needs them is shown as –; `fasc collect --diagnosis` measures them"
        )
    few = too_few_tokens([one.group for one in moments.groups.values()], moments)
    if few is not None:
        say(f"warning: forecasts are not to be trusted: {few}")


def measured_or_stored(
    loaded: LoadedModel, file: Path | None, needs: frozenset[Need], calibration: CalibrationConfig, layers: LayersConfig
) -> Statistics:
    """Statistics from a file if there is one, measured otherwise."""
    return calibrate(loaded, needs, calibration, layers) if file is None else stored_statistics(file, loaded.model)


def collect_for(
    loaded: LoadedModel,
    methods: Sequence[MethodConfig],
    calibration: CalibrationConfig,
    layers: LayersConfig,
    *,
    diagnosis: bool,
) -> Statistics:
    """What methods need for any budget; with ``diagnosis`` also what ρ, its interval, ½J and selections need, by expert."""
    return calibrate(loaded, needs_to_collect(methods, diagnosis=diagnosis), calibration, layers)


def needs_to_collect(methods: Sequence[MethodConfig], *, diagnosis: bool) -> frozenset[Need]:
    """The moments that :func:`collect_for` measures."""
    needs = needs_of(tuple(methods))
    return needs | diagnosis_needs(methods) if diagnosis else needs


def validate(  # noqa: PLR0913 - what is measured, and on what
    loaded: LoadedModel,
    methods: Sequence[MethodConfig],
    rank_fractions: Sequence[float],
    budgets: Sequence[BudgetConfig],
    *,
    statistics: Path | None,
    held_out: int,
    calibration: CalibrationConfig,
    layers: LayersConfig,
    by: Part = "group",
    evaluation: EvaluationConfig | None = None,
) -> dict[str, Any]:
    """Compress one group or block at a time, then whole models; report how well ρ and ½J predicted the measured KL divergence.

    With benchmarks each of the former is scored on the same items as the dense model (``kept``, see
    :class:`~fasc.evaluation.paired.Paired`).

    Returns:
        ``rows`` (group × method × fraction), ``summary``, ``plans`` (budget), ``calibration``.

    Raises:
        UsageError: a benchmark has no items.
    """
    look = None if evaluation is None else _looking(loaded, evaluation)
    needs = diagnosis_needs(methods)
    if budgets:
        needs |= needs_of(tuple(methods[:1]), tuple(budgets))
    moments = measured_or_stored(loaded, statistics, needs, calibration, layers)
    if statistics is not None:
        calibration = moments.calibration.model_copy(update=calibration.model_dump(exclude_unset=True))
    tokens = held_out_tokens(loaded, calibration, held_out)
    unseen = held_out_moments(loaded.model, moments, tokens, calibration)
    rows = []
    if rank_fractions:
        rows = validate_groups(loaded.model, moments, tokens, methods, rank_fractions, by=by, held_out=unseen, look=look)
    plans = validate_plans(loaded.model, moments, tokens, methods[0], budgets, held_out=unseen)
    names = [options.name for options in methods]
    summary = summarise(rows, better=names[0], worse=names[-1])
    return {"rows": rows, "summary": summary, "plans": plans, "calibration": dict(moments.meta["calibration"])}


def _looking(loaded: LoadedModel, config: EvaluationConfig) -> Callable[[], dict[str, Any]]:
    """Scores the model as it then is, beside what it is now, item by item.

    Raises:
        UsageError: a benchmark has no items.
    """
    for name in config.benchmarks:
        if get_benchmark(name).needs_text:
            raise UsageError(f"`{name}` has no items that two models could be compared on", "name others, such as facts or lama")

    def answers() -> Outcomes:
        record = Record(keep=False)
        score(*loaded, config, record=record)
        return record.outcomes

    before = answers()

    def look() -> dict[str, Any]:
        pairs = {name: paired(name, ("compressed", "as it was"), after, before[name]) for name, after in answers().items()}
        return {"kept": {name: one.to_dict() for name, one in pairs.items()}}

    return look


def subspace_overlap(  # noqa: PLR0913 - what is compared, and on what
    loaded: LoadedModel,
    calibrations: Mapping[str, CalibrationConfig],
    options: MethodConfig,
    rank_fractions: Sequence[float],
    layers: LayersConfig,
    *,
    hessian: int = 0,
    hessian_groups: int = 6,
    hessian_sequences: int = 4,
) -> dict[str, Any]:
    """Compare what a method chooses on several calibrations, by principal angles, and with the Hessian's eigenvectors.

    Args:
        loaded: the dense model.
        calibrations: by label.
        options: the method.
        rank_fractions: of each group's directions.
        layers: which.
        hessian: so many leading eigenvectors; 0 compares none.
        hessian_groups: of so many groups, spread over those with the least to the most ρ.
        hessian_sequences: held-out sequences for the Hessian.

    Returns:
        ``rows``, ``summary``, ``hessian``, ``calibrations`` (digests by label).

    Raises:
        UsageError: there is nothing to compare.
    """
    check_overlap(calibrations, rank_fractions, hessian)
    chosen = solver_of(options)
    needs = chosen.method.needs_in(("group",)) | (DEPENDENCE_NEEDS if hessian else frozenset())
    first: Statistics | None = None
    bases, digests = {}, {}
    for label, calibration in calibrations.items():  # one calibration's moments in memory at a time, beside the first's
        say(f"measuring {label}")
        moments = calibrate(loaded, needs, calibration, layers)
        bases[label] = reading_bases(loaded.model, moments, chosen, max(rank_fractions))
        digests[label] = {"token_digest": moments.meta["token_digest"], "calibration": moments.meta["calibration"]}
        first = first or moments
    assert first is not None  # noqa: S101 - there is at least one calibration
    rows = compare_subspaces(first, bases, rank_fractions)
    curvature = []
    if hessian:
        tokens = held_out_tokens(loaded, next(iter(calibrations.values())), hessian_sequences)
        groups = _spread_over_rho(first, loaded.model, hessian_groups)
        curvature = compare_with_hessian(loaded.model, first, tokens, groups, hessian, chosen.damping)
    return {"rows": rows, "summary": summarise_overlaps(rows), "hessian": curvature, "calibrations": digests}


def check_overlap(calibrations: Mapping[str, CalibrationConfig], rank_fractions: Sequence[float], hessian: int) -> None:
    """Refuse a comparison of one thing with itself.

    Raises:
        UsageError: there is nothing to compare.
    """
    if not calibrations or not rank_fractions or (len(calibrations) < 2 and not hessian):
        raise UsageError(f"{len(calibrations)} calibration leaves nothing to compare", "give several --corpora or --seeds")


def _spread_over_rho(statistics: Statistics, model: PreTrainedModel, count: int) -> list[str]:
    """So many groups, from the least to the most ρ."""
    rho = {
        name: dependence.rho
        for name, group in statistics.groups.items()
        if (dependence := group_dependence(model, group)) is not None
    }
    ordered = sorted(rho, key=lambda name: rho[name])
    steps = max(1, count - 1)
    return list(dict.fromkeys(ordered[round(i * (len(ordered) - 1) / steps)] for i in range(count)))
