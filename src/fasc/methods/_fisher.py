"""The Fisher objective, solved on the smaller side; shared by ``fasc`` (per group) and ``two-sided`` (per layer)."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from fasc.linalg.decomposition import (
    Decomposition,
    decompose_on_inputs,
    decompose_on_outputs,
    energies_on_inputs,
    energies_on_outputs,
)
from fasc.linalg.psd import cholesky, damped
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import Side, UnitStatistics, as_float64


class FisherProblem(NamedTuple):
    """The moments of a unit and the Cholesky factor of the one that has to be inverted."""

    side: Side
    """Where the gradient moment lies; the problem is solved there."""

    covariance_x: Tensor
    """float64 on the input side; as it was measured, float32, on the output side, where it may be the larger one."""

    covariance_g: Tensor
    """float64."""

    inverted: Tensor
    """Σ_xx on the input side, Σ_hh on the output side; damped."""

    chol: Tensor
    """Its lower Cholesky factor."""


def fisher_problem(statistics: UnitStatistics, damping: float, like: Tensor) -> FisherProblem:
    """The moments of a unit, ready to be solved.

    Args:
        statistics: input covariance and gradient moment of the unit, on its smaller side.
        damping: relative to the mean eigenvalue, of the covariance that has to be inverted.
        like: whose device is used.

    Raises:
        NotPositiveDefiniteError: that covariance is singular; names the unit.
        StatisticsError: no gradient moment was collected.
    """
    gradient = statistics.require_gradient()
    on_inputs = gradient.side == "input"
    _, covariance_g = as_float64(gradient.covariance, like.device)
    measured = statistics.input.matrix.to(like.device)
    covariance_x = measured.to(like) if on_inputs else measured
    inverted = damped(covariance_x if on_inputs else covariance_g, damping)
    which = "inputs'" if on_inputs else "output gradients'"
    chol = cholesky(inverted, where=f"`{statistics.name}`: the {which}", tokens=statistics.tokens)
    return FisherProblem(gradient.side, covariance_x, covariance_g, inverted, chol)


def minimise_fisher_loss(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Decomposition:
    """Minimise ``tr((W−W')ᵀ Σ_hh (W−W') Σ_xx) = tr(Aᵀ Σ_gg A Σ_xx)`` for the unit's stacked weight, [Σ d_out, d_in] float64.

    Raises:
        NotPositiveDefiniteError, StatisticsError: as :func:`fisher_problem`.
    """
    problem = fisher_problem(statistics, options.damping, weight)
    if problem.side == "input":
        return decompose_on_inputs(weight, problem.chol, problem.covariance_g)
    return decompose_on_outputs(weight, problem.covariance_x, problem.chol)


def fisher_energies(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: MethodOptions) -> Float[Tensor, " r"]:
    """The energies of :func:`minimise_fisher_loss` alone, which is all that a plan needs; same errors."""
    problem = fisher_problem(statistics, options.damping, weight)
    if problem.side == "input":
        return energies_on_inputs(problem.chol, problem.covariance_g)
    return energies_on_outputs(weight, problem.covariance_x, problem.chol)
