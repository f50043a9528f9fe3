"""The sketched form of ``fasc``: the same optimum from a randomised range finder, with what it may have lost."""

import torch
from torch import Tensor

from fasc.statistics.moments import UnitStatistics, as_float64
from fasc.planning.options import MethodConfig
from fasc.linalg.decomposition import Decomposition
from fasc.linalg.psd import cholesky, damped
from fasc.linalg.sketch import (
    Apply,
    SketchedEigenpairs,
    gaussian,
    sketch_width,
    sketched_eigenpairs,
)
from fasc.methods._fisher import minimise_fisher_loss
from fasc.methods._registry import Sketched


def sketch_fisher_loss(
    weight: Tensor, statistics: UnitStatistics, options: MethodConfig, rank: int, *, wide: bool = False
) -> Sketched:
    """Minimise the Fisher loss for one rank from a sketch; solve exactly where the sketch cannot be shown to be good enough.

    On the input side the operator ``Lᵀ Σ_gg L`` is applied factor by factor; on the output side ``Rᵀ W Σ_xx Wᵀ R`` likewise.
    Nothing of size d × d is formed beside the moments and one Cholesky factor.

    Args:
        weight: rows of all layers of the unit, float64.
        statistics: as for :func:`~fasc.methods._fisher.minimise_fisher_loss`.
        options: damping; ``sketch_tolerance``, the largest bound of the lost energy as a share of what is dropped.
        rank: directions that will be kept.
        wide: the paper's larger sketch, for high ρ.

    Raises:
        NotPositiveDefiniteError: as the exact solution.
    """
    gradient = statistics.require_gradient()
    _, covariance_x = as_float64(statistics.input, weight.device)
    _, covariance_g = as_float64(gradient.covariance, weight.device)
    on_inputs = gradient.side == "input"
    inverted = damped(covariance_x if on_inputs else covariance_g, options.damping)
    which = "inputs'" if on_inputs else "output gradients'"
    chol = cholesky(inverted, where=f"`{statistics.name}`: the {which}", tokens=statistics.tokens)
    width = sketch_width(rank, chol.shape[0], wide=wide)
    if width >= chol.shape[0]:
        return Sketched(minimise_fisher_loss(weight, statistics, options.damping), 0.0, 0.0, exact=True)
    products = (inverted, covariance_g) if on_inputs else (weight @ covariance_x, inverted @ weight)
    trace = float((products[0] * products[1]).sum())
    apply = _operator(weight, (chol, covariance_x, covariance_g), on_inputs=on_inputs)
    pairs = sketched_eigenpairs(apply, gaussian(chol.shape[0], width, chol, seed=0), trace=trace)
    estimate, bound = pairs.lost_shares(rank, apply)
    if bound > options.sketch_tolerance:
        return Sketched(minimise_fisher_loss(weight, statistics, options.damping), estimate, bound, exact=True)
    return Sketched(_decomposition(weight, chol, pairs, on_inputs=on_inputs), estimate, bound, exact=False)


def _operator(weight: Tensor, moments: tuple[Tensor, Tensor, Tensor], *, on_inputs: bool) -> Apply:
    chol, covariance_x, covariance_g = moments
    if on_inputs:
        return lambda block: chol.mT @ (covariance_g @ (chol @ block))
    return lambda block: chol.mT @ (weight @ (covariance_x @ (weight.mT @ (chol @ block))))


def _decomposition(weight: Tensor, chol: Tensor, pairs: SketchedEigenpairs, *, on_inputs: bool) -> Decomposition:
    v = pairs.vectors
    if on_inputs:
        down = torch.linalg.solve_triangular(chol.mT, v, upper=True).mT
        return Decomposition(down=down, up=weight @ (chol @ v), energies=pairs.values)
    up = torch.linalg.solve_triangular(chol.mT, v, upper=True)
    return Decomposition(down=(chol @ v).mT @ weight, up=up, energies=pairs.values)
