"""The Fisher objective, solved on the smaller side; shared by ``fasc`` (per group) and ``two-sided`` (per layer)."""

from jaxtyping import Float
from torch import Tensor

from fasc.statistics.moments import Side, UnitStatistics, as_float64
from fasc.planning.options import MethodConfig
from fasc.linalg.decomposition import (
    Decomposition,
    decompose_on_inputs,
    decompose_on_outputs,
    energies_on_inputs,
    energies_on_outputs,
)
from fasc.linalg.psd import cholesky, damped


def minimise_fisher_loss(weight: Float[Tensor, "o i"], statistics: UnitStatistics, damping: float) -> Decomposition:
    """Minimise ``tr((W−W')ᵀ Σ_hh (W−W') Σ_xx) = tr(Aᵀ Σ_gg A Σ_xx)`` for the unit's stacked weight.

    Args:
        weight: rows of all layers of the unit, float64.
        statistics: input covariance and gradient moment of the unit, on its smaller side.
        damping: relative to the mean eigenvalue, of the covariance that has to be inverted.

    Raises:
        NotPositiveDefiniteError: that covariance is singular; names the unit.
        StatisticsError: no gradient moment was collected.
    """
    side, covariance_x, covariance_g, chol = _prepare(weight, statistics, damping)
    if side == "input":
        return decompose_on_inputs(weight, chol, covariance_g)
    return decompose_on_outputs(weight, covariance_x, chol)


def fisher_energies(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodConfig) -> Float[Tensor, " r"]:
    """The energies of :func:`minimise_fisher_loss` alone, which is all that a plan needs; same errors."""
    side, covariance_x, covariance_g, chol = _prepare(weight, statistics, options.damping)
    return energies_on_inputs(chol, covariance_g) if side == "input" else energies_on_outputs(weight, covariance_x, chol)


def _prepare(weight: Tensor, statistics: UnitStatistics, damping: float) -> tuple[Side, Tensor, Tensor, Tensor]:
    """The smaller side, Σ_xx, the gradient moment there, and the Cholesky factor of the one that has to be inverted."""
    gradient = statistics.require_gradient()
    _, covariance_x = as_float64(statistics.input, weight.device)
    _, covariance_g = as_float64(gradient.covariance, weight.device)
    which = "inputs'" if gradient.side == "input" else "output gradients'"
    inverted = covariance_x if gradient.side == "input" else covariance_g
    chol = cholesky(damped(inverted, damping), where=f"`{statistics.name}`: the {which}", tokens=statistics.tokens)
    return gradient.side, covariance_x, covariance_g, chol
