"""ρ, the dependence violation score: how far inputs and their gradients are from uncorrelated (paper Eq. 2)."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasc.model.groups import InputGroup
from fasc.model.layers import weight_of
from fasc.statistics.moments import GroupStatistics, Need, UnitStatistics, as_float64

DEPENDENCE_NEEDS = frozenset({Need("input", "group"), Need("gradient", "group"), Need("cross", "group")})
"""What ρ is computed from."""


@dataclass(frozen=True, slots=True)
class Dependence:
    """ρ as the paper prints it, and beside it what the paper leaves out."""

    rho: float
    """``‖Σ_xg‖_F / (‖Σ_xx‖_F^½ ‖Σ_gg‖_F^½)``."""

    floor: float
    """ρ₀, what ρ would be on so many independent tokens if x and g were independent: sampling noise."""

    debiased: float
    """``(max(0, ρ² − ρ₀²))^½``."""

    gradient_norm: float
    """``‖Σ_gg‖_F``, nats² per token and squared input."""


def dependence_violation(statistics: UnitStatistics, weight: Tensor) -> Dependence | None:
    """ρ, its noise floor and the debiased score of one unit (arXiv:2601.07197 Eq. 2).

    If x and g were independent, ``E‖Σ̂_xg‖² = tr Σ_xx · tr Σ_gg / n`` over n independent tokens. Tokens of one sequence are not
    independent, so the true floor is somewhat higher.

    Args:
        statistics: of the unit; the gradient moments may lie on either side.
        weight: the unit's stacked weight [d_out, d_in], to bring moments of the output side to the input.

    Returns:
        The scores, or ``None`` if the statistics hold no cross covariance.
    """
    gradient = statistics.gradient
    if gradient is None or gradient.cross is None:
        return None
    _, xx = as_float64(statistics.input)
    gg, cross = gradient.at_input(weight.cpu())
    assert cross is not None  # noqa: S101 - seen above
    scale = float((torch.linalg.matrix_norm(xx) * torch.linalg.matrix_norm(gg)).clamp_min(torch.finfo(torch.float64).tiny).sqrt())
    rho = float(torch.linalg.matrix_norm(cross)) / scale
    noise = float((xx.trace() * gg.trace() / statistics.tokens).clamp_min(0).sqrt()) / scale
    return Dependence(rho, noise, max(0.0, rho**2 - noise**2) ** 0.5, float(torch.linalg.matrix_norm(gg)))


def group_dependence(model: PreTrainedModel, statistics: GroupStatistics) -> Dependence | None:
    """:func:`dependence_violation` of a group of a dense model, on the CPU."""
    return dependence_violation(statistics.unit(statistics.group.name), group_weight(model, statistics.group))


def group_weight(model: PreTrainedModel, group: InputGroup) -> Tensor:
    """The weights of a group's layers one below the other, [Σ d_out, d_in], on the CPU."""
    return torch.cat([weight_of(model, layer).detach().cpu() for layer in group.layers])
