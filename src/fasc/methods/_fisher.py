"""The Fisher objective, solved on the smaller side; shared by ``fasc`` (per group) and ``two-sided`` (per layer)."""

from jaxtyping import Float
from torch import Tensor

from fasc.calibration.statistics import UnitStatistics, as_float64
from fasc.linalg.decomposition import Decomposition, decompose_on_inputs, decompose_on_outputs
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
    gradient = statistics.require_gradient()
    _, covariance_x = as_float64(statistics.input, weight.device)
    _, covariance_g = as_float64(gradient.covariance, weight.device)
    if gradient.side == "input":
        where = f"`{statistics.name}`: the inputs'"
        chol = cholesky(damped(covariance_x, damping), where=where, tokens=statistics.tokens)
        return decompose_on_inputs(weight, chol, covariance_g)
    where = f"`{statistics.name}`: the output gradients'"
    chol = cholesky(damped(covariance_g, damping), where=where, tokens=statistics.tokens)
    return decompose_on_outputs(weight, covariance_x, chol)
