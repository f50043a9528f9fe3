"""How well ρ and ½J predict what compressing one group really costs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from fasc.planning.candidates import unit_of
from fasc.planning.plan import UnitPlan
from fasc.statistics.collect import collect
from fasc.statistics.moments import GroupStatistics, Need, Scope, Statistics
from fasc.compression.trial import UnitTester
from fasc.forecast.channels import cut_loss, cuttings_of, narrowed
from fasc.planning.make import Curves, plan_model
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.statistics.options import CalibrationConfig
from fasc.diagnosis.dependence import group_dependence
from fasc.forecast.half_j import loss_curve, loss_on
from fasc.linalg.decomposition import Decomposition
from fasc.methods import decompose_unit, get_method
from fasc.progress import Advance, progress

Row = dict[str, Any]


def validate(
    model: PreTrainedModel,
    statistics: Statistics,
    tokens: Tensor,
    methods: Sequence[MethodConfig],
    rank_fractions: Sequence[float],
    *,
    held_out: Statistics | None = None,
) -> list[Row]:
    """Compress every group alone, with each method and at each rank fraction, and measure the KL divergence on held-out text.

    Args:
        model: dense.
        statistics: with what the methods need, and the gradient moments of their units.
        tokens: held-out text, [sequences, length].
        methods: to compare.
        rank_fractions: of ``d_in`` for a shared projector, of ``min(d_in, d_out)`` for a layer.
        held_out: moments of the held-out text, see :func:`held_out_moments`.

    Returns:
        A row per group, method and fraction: ``half_j``, ``half_j_held_out`` (if there are such moments), ``kl``, ``kl_error``
        (standard error) in nats per token, ``rho``, ``rho_debiased``.
    """
    tester = UnitTester(model, statistics, tokens)
    total = len(statistics.groups) * len(methods)
    rows: list[Row] = []
    with progress("compressing groups one at a time", total, "groups") as advance, torch.no_grad():
        for group in statistics.groups.values():
            found = group_dependence(model, group)
            scores = {"rho": found and found.rho, "rho_debiased": found and found.debiased}
            for options in methods:
                parts = _parts(model, statistics, group, options)
                for fraction in rank_fractions:
                    case = _Case(parts, fraction, options.name)
                    rows.append(_measure(model, (statistics, held_out), case, tester) | scores)
                advance()
    return rows


def validate_plans(
    model: PreTrainedModel,
    statistics: Statistics,
    tokens: Tensor,
    options: MethodConfig,
    budgets: Sequence[BudgetConfig],
    *,
    held_out: Statistics | None = None,
) -> list[Row]:
    """Compress the whole model at each budget and measure what the plan forecast, on held-out text.

    Args:
        model: dense; is dense again afterwards.
        statistics: with what the method needs.
        tokens: held-out text, [sequences, length].
        options: a method.
        budgets: to plan for.
        held_out: moments of the held-out text, see :func:`held_out_moments`.

    Returns:
        A row per budget: ``budget``, ``param_fraction``, ``half_j`` (Σ½J), ``half_j_held_out``, ``kl``, ``kl_error``, ``ratio``
        (kl ÷ Σ½J), ``nll_increase``, all in nats per token.
    """
    tester = UnitTester(model, statistics, tokens)
    groups = [group.group for group in statistics.groups.values()]
    known: dict[str, Curves] = {}
    rows: list[Row] = []
    for budget in budgets:
        plan = plan_model(model, groups, options, budget, statistics, known=known)
        units = [unit for unit in plan.units if unit.layout != "dense"]
        if not units and not plan.cuts:
            continue
        cuttings = list(cuttings_of(model, statistics, plan.cuts, options.damping))
        narrow = narrowed(statistics, cuttings)
        judge = None if held_out is None else narrowed(held_out, cuttings)
        with progress(f"measuring {options.name} at {budget.label}", len(units), "units") as advance:
            unseen = [] if held_out is None else [cut_loss(model, held_out, one) for one in cuttings]
            decompose = partial(_decompose, model, (narrow, judge), options, unseen, advance)
            measured = tester.measure_plan(units, decompose, cuttings)
        half_j = plan.predicted_loss
        rows.append(
            {
                "budget": budget.label,
                "method": options.name,
                "param_fraction": plan.totals["param_fraction"],
                "half_j": half_j,
                "half_j_held_out": sum(unseen) if held_out is not None else None,
                "kl": measured.nats,
                "kl_error": measured.error,
                "ratio": measured.nats / half_j if half_j else None,
                "nll_increase": measured.nll_increase,
            }
        )
    return rows


def _decompose(
    model: PreTrainedModel,
    moments: tuple[Statistics, Statistics | None],
    options: MethodConfig,
    unseen: list[float],
    advance: Advance,
    unit: UnitPlan,
) -> Decomposition:
    """The decomposition of a unit, and its ½J by held-out moments noted."""
    full = decompose_unit(model, moments[0], unit, options)
    if moments[1] is not None:
        unseen.append(float(loss_on(model, moments[1], unit, full)[unit.rank]))
    advance()
    return full


def _parts(
    model: PreTrainedModel, statistics: Statistics, group: GroupStatistics, options: MethodConfig
) -> list[tuple[UnitPlan, Decomposition]]:
    plans = [unit_of(group.group, layers) for layers in group.group.parts(get_method(options.name).scope)]
    return [(unit, decompose_unit(model, statistics, unit, options)) for unit in plans]


class _Case(NamedTuple):
    parts: Sequence[tuple[UnitPlan, Decomposition]]
    fraction: float
    method: str


def _measure(model: PreTrainedModel, moments: tuple[Statistics, Statistics | None], case: _Case, tester: UnitTester) -> Row:
    statistics, held_out = moments
    units: list[tuple[UnitPlan, Decomposition]] = []
    half_j, unseen = 0.0, 0.0
    for unit, full in case.parts:
        rank = max(1, int(case.fraction * unit.full_rank + 1e-9))
        units.append((replace(unit, rank=rank, layout="factors" if len(unit.layers) == 1 else "shared"), full))
        kept = min(rank, full.full_rank)
        half_j += float(loss_curve(model, statistics, unit, case.method, full)[kept])
        unseen += 0.0 if held_out is None else float(loss_on(model, held_out, unit, full)[kept])
    measured = tester.measure(units)
    group = statistics.groups[case.parts[0][0].group].group
    return {
        "group": group.name,
        "block": group.block,
        "kind": group.kind,
        "method": case.method,
        "rank_fraction": case.fraction,
        "half_j": half_j,
        "half_j_held_out": None if held_out is None else unseen,
        "kl": measured.nats,
        "kl_error": measured.error,
    }


def held_out_moments(
    model: PreTrainedModel, statistics: Statistics, tokens: Tensor, calibration: CalibrationConfig
) -> Statistics:
    """Input and gradient moments of held-out text, for every unit of which ``statistics`` holds gradients.

    A subspace looks better on the tokens that chose it than on others; moments of others say how much.
    """
    scopes: set[Scope] = {
        "group" if unit == name else "layer" for name, group in statistics.groups.items() for unit in group.gradients
    }
    needs = frozenset({Need("input", "group"), *(Need("gradient", scope) for scope in scopes)})
    return collect(model, tokens, needs, calibration=calibration)


def summarise(rows: Sequence[Mapping[str, Any]], *, better: str = "fasc", worse: str = "svd") -> list[Row]:
    """How well each forecast predicted the measured KL, or the gain of one method over another.

    Args:
        rows: of :func:`validate`.
        better: the method whose gain is predicted.
        worse: over which.

    Returns:
        One row per forecast, method and fraction (``None``: all fractions): ``pearson`` (of logs for ½J), ``pearson_p``,
        ``spearman``, ``spearman_p``, ``median_ratio`` (measured ÷ forecast, for ½J), ``n``.
    """
    fractions = sorted({row["rank_fraction"] for row in rows})
    forecasts = {"½J → KL": "half_j"}
    if any(row.get("half_j_held_out") is not None for row in rows):
        forecasts["½J on held-out moments → KL"] = "half_j_held_out"
    found: list[Row] = []
    for method in dict.fromkeys(row["method"] for row in rows):
        for (name, key), fraction in product(forecasts.items(), [None, *fractions]):
            chosen = [r for r in rows if r["method"] == method and fraction in (None, r["rank_fraction"]) and r["kl"] > 0]
            pairs = [(r[key], r["kl"]) for r in chosen if r[key] > 0]
            found.append(_row(name, method, fraction, pairs, logs=True))
    for fraction in [None, *fractions]:
        found += _gains(rows, fraction, better, worse)
    return found


def _gains(rows: Sequence[Mapping[str, Any]], fraction: float | None, better: str, worse: str) -> list[Row]:
    chosen = [row for row in rows if fraction in (None, row["rank_fraction"]) and row["kl"] > 0]
    by_case = {(row["group"], row["rank_fraction"], row["method"]): row for row in chosen}
    pairs = []
    for (group, at, name), ours in by_case.items():
        theirs = by_case.get((group, at, worse))
        if name == better and theirs is not None:
            pairs.append((ours, theirs))
    if not pairs:
        return []
    name = f"{better} over {worse}"
    found = []
    for score in ("rho", "rho_debiased"):
        if all(ours[score] is not None for ours, _ in pairs):
            gains = [(ours[score], float(np.log(theirs["kl"] / ours["kl"]))) for ours, theirs in pairs]
            found.append(_row(f"{score} → log KL gain", name, fraction, gains, logs=False))
    ratios = [(theirs["half_j"] / ours["half_j"], theirs["kl"] / ours["kl"]) for ours, theirs in pairs if ours["half_j"] > 0]
    found.append(_row("J gain → KL gain", name, fraction, ratios, logs=True))
    found[-1]["share_better"] = sum(theirs["kl"] > ours["kl"] for ours, theirs in pairs) / len(pairs)
    return found


def _row(what: str, method: str, fraction: float | None, pairs: Sequence[tuple[float, float]], *, logs: bool) -> Row:
    row: Row = {"forecast": what, "method": method, "rank_fraction": fraction, "n": len(pairs)}
    if len(pairs) < 3:
        return row | dict.fromkeys(("pearson", "pearson_p", "spearman", "spearman_p", "median_ratio"))
    x, y = np.array(pairs).T
    linear = stats.pearsonr(np.log(x), np.log(y)) if logs else stats.pearsonr(x, y)
    ranked = stats.spearmanr(x, y)
    return row | {
        "pearson": float(linear.statistic),
        "pearson_p": float(linear.pvalue),
        "spearman": float(ranked.statistic),
        "spearman_p": float(ranked.pvalue),
        "median_ratio": float(np.median(y / x)) if logs else None,
    }
