"""How well ρ and ½J predict what compressing one group really costs."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from transformers import PreTrainedModel

from fasc.compression.trial import Trial
from fasc.diagnosis.dependence import group_dependence
from fasc.diagnosis.solutions import Solution, solutions_of
from fasc.edits.attention import Heads, Values
from fasc.edits.factor import Factor, Problem
from fasc.edits.narrow import Narrow
from fasc.forecast.attention import reduction_loss
from fasc.forecast.channels import narrowing_loss
from fasc.forecast.half_j import fisher_loss_curve, loss_curve
from fasc.layouts import LAYOUTS
from fasc.methods import AtRank
from fasc.model.groups import Scope, stacked_weight
from fasc.planning.candidates import Curves
from fasc.planning.make import plan_model
from fasc.planning.needs import solver_of
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import Plan
from fasc.progress import Advance, progress
from fasc.statistics.collect import collect_moments
from fasc.statistics.moments import GroupStatistics, Need, Statistics
from fasc.statistics.narrowing import narrowed
from fasc.statistics.options import CalibrationConfig
from fasc.statistics.reduction import reduced

Row = dict[str, Any]
Part = Literal["group", "block"]

_EQUAL = 1e-9
"""Relative spread of numbers that are the same."""


def validate(  # noqa: PLR0913 - what is measured, and on what
    model: PreTrainedModel,
    statistics: Statistics,
    tokens: Tensor,
    methods: Sequence[MethodConfig],
    rank_fractions: Sequence[float],
    *,
    by: Part = "group",
    held_out: Statistics | None = None,
    look: Callable[[], Row] | None = None,
) -> list[Row]:
    """Compress every group alone, with each method and at each rank fraction, and measure the KL divergence on held-out text.

    Args:
        model: dense.
        statistics: with what the methods need, and the gradient moments of their units.
        tokens: held-out text, [sequences, length].
        methods: to compare.
        rank_fractions: of ``d_in`` for a shared projector, of ``min(d_in, d_out)`` for a layer.
        by: what is compressed at a time: one group of layers, or all groups of one block (the paper's Figure 2).
        held_out: moments of the held-out text, see :func:`held_out_moments`.
        look: called while each is compressed; what it gives stands in the row.

    Returns:
        A row per group or block, method and fraction: ``half_j``, ``half_j_held_out`` (if there are such moments), ``kl``,
        ``kl_error`` (standard error) in nats per token, and for a group ``rho`` and ``rho_debiased``.
    """
    trial = Trial(model, statistics, tokens)
    parts: dict[str, list[GroupStatistics]] = {}
    for name, group in statistics.groups.items():
        parts.setdefault(name if by == "group" else f"block {group.group.block}", []).append(group)
    rows: list[Row] = []
    with progress(f"compressing {by}s one at a time", len(parts) * len(methods), f"{by}s") as advance, torch.no_grad():
        for name, groups in parts.items():
            dependence = group_dependence(model, groups[0]) if by == "group" else None
            scores = {"rho": dependence and dependence.rho, "rho_debiased": dependence and dependence.debiased}
            kind = groups[0].group.kind if by == "group" else by
            named = {"group": name, "block": groups[0].group.block, "kind": kind}
            for options in methods:
                solutions = [one for group in groups for one in solutions_of(model, statistics, group.group, solver_of(options))]
                for fraction in rank_fractions:
                    rows.append(named | _measure(model, (statistics, held_out), solutions, fraction, trial, look) | scores)
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
        A row per budget: ``budget``, ``param_fraction``, ``half_j`` (Σ½J), ``half_j_held_out`` (if every edit has one), ``kl``,
        ``kl_error``, ``ratio`` (kl ÷ Σ½J), ``nll_increase``, all in nats per token.
    """
    trial = Trial(model, statistics, tokens)
    groups = [group.group for group in statistics.groups.values()]
    known: dict[str, Curves] = {}
    rows: list[Row] = []
    for budget in budgets:
        plan = plan_model(model, groups, options, budget, statistics, known=known)
        if not plan.edits:
            continue
        unseen: list[float] = []
        with progress(f"measuring {options.name} at {budget.label}", len(plan.edits), "edits") as advance:
            measured = trial.measure(plan.edits, _carrying_out(model, (statistics, held_out), plan, unseen, advance))
        half_j = plan.predicted_loss
        rows.append(
            {
                "budget": budget.label,
                "method": options.name,
                "param_fraction": plan.totals["param_fraction"],
                "half_j": half_j,
                "half_j_held_out": sum(unseen) if held_out is not None and len(unseen) == len(plan.edits) else None,
                "kl": measured.nats,
                "kl_error": measured.error,
                "ratio": measured.nats / half_j if half_j else None,
                "nll_increase": measured.nll_increase,
            }
        )
    return rows


def _carrying_out(
    model: PreTrainedModel, moments: tuple[Statistics, Statistics | None], plan: Plan, unseen: list[float], advance: Advance
) -> Callable[[], None]:
    """Makes a plan's edits, and notes the ½J of each by held-out moments."""

    def make() -> None:
        statistics, held_out = moments
        for edit in plan.edits:
            if isinstance(edit, Narrow):
                narrowing = edit.choose(model, statistics)
                if held_out is not None:
                    unseen.append(narrowing_loss(model, held_out, narrowing))
                    held_out = narrowed(held_out, narrowing)
                edit.carry_out(model, statistics, narrowing)
                statistics = narrowed(statistics, narrowing)
            elif isinstance(edit, Factor):
                problem = Problem(stacked_weight(model, edit.unit), statistics.unit(edit.unit))
                full = edit.solver.decompose(*problem[:2])
                if held_out is not None:
                    unseen.append(float(fisher_loss_curve(full, problem.weight, held_out.unit(edit.unit))[edit.rank]))
                edit.place(model, problem, AtRank(full))
            else:
                if held_out is not None and isinstance(edit, (Heads, Values)):
                    reduction = edit.choose(model, statistics)
                    unseen.append(reduction_loss(stacked_weight(model, reduction.coupling.consumer.unit()), held_out, reduction))
                    held_out = reduced(held_out, reduction)
                statistics = edit.apply(model, statistics)
            advance()

    return make


def _measure(
    model: PreTrainedModel,
    moments: tuple[Statistics, Statistics | None],
    solutions: Sequence[Solution],
    fraction: float,
    trial: Trial,
    look: Callable[[], Row] | None,
) -> Row:
    _, held_out = moments
    edits: list[Factor] = []
    half_j, unseen = 0.0, 0.0
    for one in solutions:
        rank = max(1, int(fraction * one.unit.full_rank + 1e-9))
        layout = next(layout for layout in LAYOUTS.values() if layout.asks_for == one.unit.scope)
        edits.append(Factor.of(one.unit, rank, layout, one.solver))
        directions = min(rank, one.full.full_rank)
        half_j += float(loss_curve(one.solver, one.full, *one.problem[:2])[directions])
        if held_out is not None:
            unseen += float(fisher_loss_curve(one.full, one.problem.weight, held_out.unit(one.unit))[directions])

    def make() -> None:
        for edit, one in zip(edits, solutions, strict=True):
            edit.place(model, one.problem, AtRank(one.full))

    seen: Row = {}
    measured = trial.measure(edits, make, None if look is None else lambda: seen.update(look()))
    return {
        "method": solutions[0].solver.name,
        "rank_fraction": fraction,
        "half_j": half_j,
        "half_j_held_out": None if held_out is None else unseen,
        "kl": measured.nats,
        "kl_error": measured.error,
        **seen,
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
    return collect_moments(model, tokens, needs, calibration=calibration)


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
    row |= dict.fromkeys(("pearson", "pearson_p", "spearman", "spearman_p", "median_ratio"))
    if len(pairs) < 3:
        return row
    x, y = np.array(pairs).T
    row["median_ratio"] = float(np.median(y / x)) if logs else None
    if (
        np.ptp(x) <= _EQUAL * np.abs(x).max() or np.ptp(y) <= _EQUAL * np.abs(y).max()
    ):  # a correlation needs something that varies
        return row
    linear = stats.pearsonr(np.log(x), np.log(y)) if logs else stats.pearsonr(x, y)
    ranked = stats.spearmanr(x, y)
    return row | {
        "pearson": float(linear.statistic),
        "pearson_p": float(linear.pvalue),
        "spearman": float(ranked.statistic),
        "spearman_p": float(ranked.pvalue),
    }
