"""The per-group table: spectra, energies, and what a rank would cost."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fasc.diagnosis.bootstrap import rho_by_tokens, rho_interval
from fasc.diagnosis.dependence import DEPENDENCE_NEEDS, group_dependence
from fasc.diagnosis.experts import expert_rows
from fasc.diagnosis.solutions import Solution, solutions_of
from fasc.diagnosis.spectra import effective_rank, principal_angles, rank_keeping, stable_rank
from fasc.forecast.half_j import loss_curve
from fasc.linalg.decomposition import Decomposition
from fasc.methods import Solver, get_method
from fasc.outputs import write_artifact
from fasc.planning.needs import solver_of
from fasc.planning.options import MethodConfig
from fasc.planning.plan import Plan
from fasc.progress import progress
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GroupStatistics, Need, Statistics
from fasc.storage import new_file, read_json

Exclude = Callable[[Sequence[Mapping[str, Any]]], list[str | None]]
"""Rows → why each is excluded, or ``None``."""

INTERVAL_NEED = Need("sequences", "group")
"""What the interval of ρ is computed from."""

SHARES = (0.90, 0.95, 0.99)
"""Shares of the energy for which the table gives the rank."""

CURVE_POINTS = 41
"""Points of the energy curves, from rank fraction 0 to 1."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One row per input group, as plain JSON values."""

    rows: tuple[Mapping[str, Any], ...]
    meta: Mapping[str, Any]
    plan: Plan | None = None
    """Whose experts the table of experts describes as well."""

    @property
    def experts(self) -> list[dict[str, Any]]:
        """One row per expert of a mixture: see :func:`~fasc.diagnosis.experts.expert_rows`."""
        return expert_rows(self.rows, self.plan)

    def table(self) -> list[dict[str, Any]]:
        """Flat rows of numbers and words, ready for ``pandas.DataFrame``; nested ones are named like ``predicted_loss.fasc``."""
        return [dict(_flat(row)) for row in self.rows]

    def save_csv(self, path: Path) -> Path:
        """Write :meth:`table` as CSV."""
        rows = self.table()
        columns = list(dict.fromkeys(key for row in rows for key in row))
        with new_file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(rows)
        return path

    def save(self, path: Path) -> Path:
        """Write ``diagnosis.json``: an object with ``groups``, ``meta`` and, of a mixture, ``experts``."""
        experts = {"experts": self.experts} if self.experts else {}
        return write_artifact(path, "diagnosis", {"groups": list(self.rows), **experts, "meta": dict(self.meta)})

    @staticmethod
    def load(path: Path) -> "Diagnosis":
        """Inverse of :meth:`save`, but for what a plan makes of experts."""
        raw = read_json(path)
        return Diagnosis(tuple(raw["groups"]), raw["meta"])


def _flat(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            if all(isinstance(item, str) for item in value):
                yield f"{prefix}{key}", " ".join(value)
        else:
            yield f"{prefix}{key}", value


def diagnosis_needs(methods: Sequence[MethodConfig]) -> frozenset[Need]:
    """The moments that the whole table needs: the methods' own, those of ρ and its interval, and the gradients of ½J."""
    chosen = [get_method(options.name) for options in methods]
    own = frozenset().union(*(method.needs for method in chosen))
    return own | DEPENDENCE_NEEDS | {INTERVAL_NEED} | {Need("gradient", method.scope) for method in chosen}


def diagnose(
    model: PreTrainedModel,
    statistics: Statistics,
    methods: Sequence[MethodConfig],
    *,
    rank_fraction: float,
    exclude: Exclude | None = None,
    plan: Plan | None = None,
) -> Diagnosis:
    """Spectra of the moments, ρ, and each method's energies and forecast, for every group.

    Args:
        model: the dense model that the statistics were measured on.
        statistics: with the moments that the methods need; what else is there (cross moments, sketches, gradients) adds columns.
        methods: whose energies to look at.
        rank_fraction: ½J is given at the rank that a uniform plan of it has, the angles at this fraction of the directions.
            Angles are between the first and the last method whose projectors are of whole groups.
        exclude: says of each row why it is not to be trusted; none is by default.
        plan: of this model: the table of experts says what it makes of each.

    Raises:
        StatisticsError: a method's moments are missing.
    """
    solvers = [solver_of(options) for options in methods]
    for chosen in solvers:
        statistics.require(chosen.method.needs)
    whole = [one.name for one in solvers if one.method.scope == "group"]
    compared = (whole[0], whole[-1]) if len(whole) > 1 else None
    rows = []
    with progress("diagnosing", len(statistics.groups), "groups") as advance, torch.no_grad():
        for group in statistics.groups.values():
            parts = {one.name: solutions_of(model, statistics, group.group, one) for one in solvers}
            energies = {one.name: _energies(one, parts[one.name], rank_fraction) for one in solvers}
            losses = {name: e["predicted_loss"] for name, e in energies.items() if "predicted_loss" in e}
            scores = _dependence(model, group) | {"angle": compared and _angle(parts, compared, rank_fraction)}
            rows.append(_row(group) | scores | {"methods": energies, "predicted_loss": losses})
            advance()
    reasons = [None] * len(rows) if exclude is None else exclude(rows)
    rows = [row | {"excluded": reason} for row, reason in zip(rows, reasons, strict=True)]
    return Diagnosis(tuple(rows), {"rank_fraction": rank_fraction, "angles_between": compared, **statistics.meta}, plan)


def _row(group: GroupStatistics) -> dict[str, Any]:
    row: dict[str, Any] = {
        "group": group.group.name,
        "block": group.group.block,
        "kind": group.group.kind,
        "expert": group.group.layers[0].expert,
        "layers": [layer.name for layer in group.group.layers],
        "d_in": group.group.d_in,
        "d_out": group.group.d_out,
        "tokens": group.tokens,
        "share": group.share,
        "input": _spectrum(group.input),
    }
    gradient = group.gradients.get(group.group.name)
    if gradient is not None:
        row["gradient"] = _spectrum(gradient.covariance) | {"side": gradient.side}
    return row


def _dependence(model: PreTrainedModel, group: GroupStatistics) -> dict[str, Any]:
    scores = group_dependence(model, group)
    if scores is None:
        return dict.fromkeys(("rho", "rho_floor", "rho_debiased", "rho_low", "rho_high", "rho_by_tokens", "gradient_norm"))
    resampled = "sequences/xg" in group.extras
    low, high = rho_interval(group.extras, scores.rho) if resampled else (None, None)
    return {
        "rho": scores.rho,
        "rho_floor": scores.floor,
        "rho_debiased": scores.debiased,
        "rho_low": low,
        "rho_high": high,
        "rho_by_tokens": rho_by_tokens(group.extras, scores.rho) if resampled else None,
        "gradient_norm": scores.gradient_norm,
    }


def _angle(parts: Mapping[str, Sequence[Solution]], compared: tuple[str, str], rank_fraction: float) -> float:
    """Median principal angle, in degrees, between what two methods of whole groups read of the input at this rank."""
    one, other = (parts[name][0].full.down for name in compared)
    rank = max(1, round(rank_fraction * min(one.shape[0], other.shape[0])))
    return float(principal_angles(one[:rank].mT, other[:rank].mT).median())


def _spectrum(covariance: Covariance) -> dict[str, Any]:
    values = torch.linalg.eigvalsh(covariance.matrix).flip(-1).clamp_min(0).double()
    return {
        "trace": float(values.sum()),
        "effective_rank": effective_rank(values),
        "stable_rank": stable_rank(values),
        **{f"rank_{share:.0%}".rstrip("%"): rank_keeping(values, share) for share in SHARES},
    }


def _energies(chosen: Solver, parts: Sequence[Solution], rank_fraction: float) -> dict[str, Any]:
    """One method on one group; the per-layer methods' energies are pooled over the layers."""
    pooled = torch.cat([part.full.energies for part in parts]).sort(descending=True).values
    result: dict[str, Any] = {
        "energy": float(pooled.sum()),
        "energy_unit": chosen.method.energy_unit,
        "directions": pooled.shape[0],
        **{f"rank_{share:.0%}".rstrip("%"): rank_keeping(pooled, share) for share in SHARES},
        "curve": _curve([part.full for part in parts]),
    }
    if all(part.problem.statistics.gradient is not None for part in parts):
        curves = [loss_curve(chosen, part.full, part.problem.weight, part.problem.statistics) for part in parts]
        ranks = [int(rank_fraction * part.unit.full_rank + 1e-9) for part in parts]
        result["predicted_loss"] = sum(float(curve[min(rank, len(curve) - 1)]) for curve, rank in zip(curves, ranks, strict=True))
    return result


def _curve(parts: Sequence[Decomposition]) -> list[float]:
    """Share of the energy lost at equally spaced rank fractions, from 0 to 1."""
    total = sum(float(part.energies.sum()) for part in parts)
    points = torch.linspace(0, 1, CURVE_POINTS).tolist()
    lost = [sum(float(part.energies[round(f * part.full_rank) :].sum()) for part in parts) for f in points]
    return [value / total if total > 0 else 0.0 for value in lost]
