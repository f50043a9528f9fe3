"""The paper's randomised sketch (App. C): ``fasc-sketch`` and ``two-sided-sketch``, the same optimum from a range finder.

What a sketch may have lost is known afterwards; where it cannot be shown to be good enough the unit is solved exactly.
"""

from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fasc.diagnosis.dependence import dependence_violation
from fasc.linalg.decomposition import Decomposition
from fasc.linalg.sketch import Apply, SketchedEigenpairs, gaussian, sketch_width, sketched_eigenpairs
from fasc.methods import AtRank, method
from fasc.methods._fisher import FisherProblem, fisher_energies, fisher_problem, minimise_fisher_loss
from fasc.methods.options import MethodOptions
from fasc.statistics.moments import UnitStatistics


class SketchOptions(MethodOptions):
    """How good a sketch must be, and when the paper takes a wide one."""

    tolerance: Annotated[float, Field(ge=0)] = 0.02
    """Largest share of the dropped energy that a sketch may have lost; beyond it the unit is solved exactly."""

    threshold: Annotated[float, Field(ge=0)] = 0.3
    """Of ρ; above it the paper's sketch is wide. ρ needs the cross covariance (``fasc collect --diagnosis``)."""


def is_wide(weight: Tensor, statistics: UnitStatistics, threshold: float) -> bool:
    """Whether the paper takes its larger sketch; not where ρ is unknown."""
    dependence = dependence_violation(statistics, weight)
    return dependence is not None and dependence.rho > threshold


def noted(decomposition: Decomposition, *, exact: bool, estimate: float, bound: float) -> AtRank:
    """A decomposition and how much energy it may have lost against the exact one, ÷ energy dropped."""
    return AtRank(decomposition, exact, {"exact": exact, "lost_estimate": estimate, "lost_bound": bound})


def sketch_fisher_loss(weight: Tensor, statistics: UnitStatistics, options: SketchOptions, rank: int) -> AtRank:
    """Minimise the Fisher loss for one rank from a sketch, or exactly.

    On the input side the operator ``Lᵀ Σ_gg L`` is applied factor by factor; on the output side ``Rᵀ W Σ_xx Wᵀ R`` likewise.
    Nothing of size d × d is formed beside the moments and one Cholesky factor.

    Args:
        weight: rows of all layers of the unit, [Σ d_out, d_in] float64.
        statistics: of the unit.
        options: damping; tolerance.
        rank: directions that will be kept.

    Raises:
        NotPositiveDefiniteError, StatisticsError: as the exact solution.
    """
    problem = fisher_problem(statistics, options.damping, weight)
    size = problem.chol.shape[0]
    width = sketch_width(rank, size, wide=is_wide(weight, statistics, options.threshold))
    if width >= size:
        return noted(minimise_fisher_loss(weight, statistics, options), exact=True, estimate=0.0, bound=0.0)
    if problem.side == "input":
        trace = float((problem.inverted * problem.covariance_g).sum())
    else:
        trace = float(((weight @ problem.covariance_x.to(weight)) * (problem.inverted @ weight)).sum())
    apply = _operator(weight, problem)
    pairs = sketched_eigenpairs(apply, gaussian(size, width, problem.chol, seed=0), trace=trace)
    estimate, bound = pairs.lost_shares(rank, apply)
    if bound > options.tolerance:
        return noted(minimise_fisher_loss(weight, statistics, options), exact=True, estimate=estimate, bound=bound)
    return noted(_decomposition(weight, problem, pairs), exact=False, estimate=estimate, bound=bound)


def _operator(weight: Tensor, problem: FisherProblem) -> Apply:
    chol = problem.chol
    if problem.side == "input":
        return lambda block: chol.mT @ (problem.covariance_g @ (chol @ block))
    covariance_x = problem.covariance_x.to(weight)
    return lambda block: chol.mT @ (weight @ (covariance_x @ (weight.mT @ (chol @ block))))


def _decomposition(weight: Tensor, problem: FisherProblem, pairs: SketchedEigenpairs) -> Decomposition:
    v, chol = pairs.vectors, problem.chol
    solved = torch.linalg.solve_triangular(chol.mT, v, upper=True)
    if problem.side == "input":
        return Decomposition(down=solved.mT, up=weight @ (chol @ v), energies=pairs.values)
    return Decomposition(down=(chol @ v).mT @ weight, up=solved, energies=pairs.values)


@method(
    "fasc-sketch",
    scopes=("group", "layer"),
    needs={"input", "gradient"},
    energy_unit="nats²/token",
    surrogate="tr((I−P)ᵀ Σ_gg (I−P) Σ_xx)",
    reference="arXiv:2601.07197 §2.3, App. C, for the objective of Eq. 1; bound: Halko, Martinsson & Tropp 2011",
    options=SketchOptions,
    energies=fisher_energies,
    at_rank=sketch_fisher_loss,
)
def fasc_sketch(weight: Tensor, statistics: UnitStatistics, options: SketchOptions) -> Decomposition:
    """`fasc` from the paper's randomised sketch where that is good enough, exactly elsewhere."""
    return minimise_fisher_loss(weight, statistics, options)


@method(
    "two-sided-sketch",
    scopes=("layer",),
    needs={"input", "gradient"},
    energy_unit="nats²/token",
    surrogate="‖Σ_hh^½ (W − W') Σ_xx^½‖²",
    reference="arXiv:2601.07197 §2.3, App. C, for two-sided whitening",
    options=SketchOptions,
    energies=fisher_energies,
    at_rank=sketch_fisher_loss,
)
def two_sided_sketch(weight: Tensor, statistics: UnitStatistics, options: SketchOptions) -> Decomposition:
    """`two-sided` from the paper's randomised sketch where that is good enough, exactly elsewhere."""
    return minimise_fisher_loss(weight, statistics, options)
