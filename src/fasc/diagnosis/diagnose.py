"""The per-group table: spectra, energies, and what a rank would cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from fasc.calibration.statistics import GroupStatistics, Need, Statistics
from fasc.config import MethodConfig
from fasc.diagnosis.dependence import dependence_violation
from fasc.diagnosis.spectra import effective_rank, rank_keeping, stable_rank
from fasc.linalg.decomposition import Decomposition
from fasc.linalg.moments import Covariance
from fasc.methods import get_method
from fasc.model.layers import weight_of
from fasc.progress import progress
from fasc.storage import read_json, write_json

DEPENDENCE_NEEDS = frozenset({Need("input", "group"), Need("gradient", "group"), Need("cross", "group")})
"""What ρ is computed from."""

SHARES = (0.90, 0.95, 0.99)
"""Shares of the energy for which the table gives the rank."""

CURVE_POINTS = 41
"""Points of the energy curves, from rank fraction 0 to 1."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """One row per input group, as plain JSON values."""

    rows: tuple[Mapping[str, Any], ...]
    meta: Mapping[str, Any]

    def save(self, path: Path) -> Path:
        """Write ``diagnosis.json``: an object with ``groups`` and ``meta``."""
        return write_json(path, {"groups": list(self.rows), "meta": dict(self.meta)})

    @staticmethod
    def load(path: Path) -> "Diagnosis":
        """Inverse of :meth:`save`."""
        raw = read_json(path)
        return Diagnosis(tuple(raw["groups"]), raw["meta"])


def diagnose(
    model: PreTrainedModel, statistics: Statistics, methods: Sequence[MethodConfig], *, rank_fraction: float
) -> Diagnosis:
    """Spectra of the moments, and each method's energies, for every group.

    Args:
        model: the dense model that the statistics were measured on.
        statistics: with the moments that the methods need.
        methods: whose energies to look at.
        rank_fraction: ½J is given at this fraction of each decomposition's directions.

    Raises:
        StatisticsError: a method's moments are missing.
    """
    for options in methods:
        statistics.require(get_method(options.name).needs)
    rows = []
    with progress("diagnosing", len(statistics.groups), "groups") as advance, torch.no_grad():
        for group in statistics.groups.values():
            energies = {options.name: _energies(model, group, options, rank_fraction) for options in methods}
            losses = {name: e["predicted_loss"] for name, e in energies.items() if "predicted_loss" in e}
            rows.append(_row(group) | _dependence(model, group) | {"methods": energies, "predicted_loss": losses})
            advance()
    return Diagnosis(tuple(rows), {"rank_fraction": rank_fraction, **statistics.meta})


def _row(group: GroupStatistics) -> dict[str, Any]:
    row: dict[str, Any] = {
        "group": group.group.name,
        "block": group.group.block,
        "kind": group.group.kind,
        "layers": [layer.name for layer in group.group.layers],
        "d_in": group.group.d_in,
        "d_out": group.group.d_out,
        "tokens": group.tokens,
        "input": _spectrum(group.input),
    }
    gradient = group.gradients.get(group.group.name)
    if gradient is not None:
        row["gradient"] = _spectrum(gradient.covariance) | {"side": gradient.side}
    return row


def _dependence(model: PreTrainedModel, group: GroupStatistics) -> dict[str, Any]:
    weight = torch.cat([weight_of(model, layer).detach().cpu() for layer in group.group.layers])
    found = dependence_violation(group, weight)
    if found is None:
        return {"rho": None, "rho_floor": None, "rho_debiased": None}
    return {"rho": found.rho, "rho_floor": found.floor, "rho_debiased": found.debiased}


def _spectrum(covariance: Covariance) -> dict[str, Any]:
    values = torch.linalg.eigvalsh(covariance.matrix).flip(-1).clamp_min(0).double()
    return {
        "trace": float(values.sum()),
        "effective_rank": effective_rank(values),
        "stable_rank": stable_rank(values),
        **{f"rank_{share:.0%}".rstrip("%"): rank_keeping(values, share) for share in SHARES},
    }


def _energies(model: PreTrainedModel, group: GroupStatistics, options: MethodConfig, rank_fraction: float) -> dict[str, Any]:
    """One method on one group; the per-layer methods' energies are pooled over the layers."""
    method = get_method(options.name)
    layers = group.group.layers
    weights = {layer.name: weight_of(model, layer).detach().double() for layer in layers}
    parts: list[Decomposition]
    if method.scope == "group":
        parts = [method.decompose(torch.cat(list(weights.values())), group.unit(group.group.name), options)]
    else:
        parts = [method.decompose(weight, group.unit(name), options) for name, weight in weights.items()]
    pooled = torch.cat([part.energies for part in parts]).sort(descending=True).values
    result: dict[str, Any] = {
        "energy": float(pooled.sum()),
        "energy_unit": method.energy_unit,
        "directions": pooled.shape[0],
        **{f"rank_{share:.0%}".rstrip("%"): rank_keeping(pooled, share) for share in SHARES},
        "curve": _curve(parts),
    }
    if method.energy_unit == "nats²/token":
        lost = sum(float(part.energies[round(rank_fraction * part.full_rank) :].sum()) for part in parts)
        result["predicted_loss"] = 0.5 * lost
    return result


def _curve(parts: Sequence[Decomposition]) -> list[float]:
    """Share of the energy lost at equally spaced rank fractions, from 0 to 1."""
    total = sum(float(part.energies.sum()) for part in parts)
    points = torch.linspace(0, 1, CURVE_POINTS).tolist()
    lost = [sum(float(part.energies[round(f * part.full_rank) :].sum()) for part in parts) for f in points]
    return [value / total if total > 0 else 0.0 for value in lost]
