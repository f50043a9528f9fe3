"""The paper's printed formula (Eq. 6), literally. It is not the solution of Eq. 1 and collapses models; see docs/method.md."""

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.errors import NonFiniteError
from fasc.linalg.decomposition import Decomposition
from fasc.linalg.psd import descending_eigh
from fasc.linalg.sketch import gaussian, ritz_pairs, sketch_width
from fasc.methods import AtRank, method
from fasc.paper.sketch import SketchOptions, is_wide, noted
from fasc.statistics.moments import UnitStatistics, as_float64

EPSILON = 1e-8
"""The paper's ε (B.1): an absolute shift of ``Σ_xx``."""

CUTOFF = 1e-6
"""The paper's τ (App. C): singular values of ``Σ_xx`` below it are left out of the pseudo-inverse."""


class Eq6Options(SketchOptions):
    """How the paper's eigenvectors are read, and whether they come from its sketch."""

    reading: Literal["orthonormal", "oblique"] = "orthonormal"
    """How a projector is made of the eigenvectors: `orthonormal` (QR of V) or `oblique` (P = Σ_xx V Vᵀ)."""

    sketch: bool = False
    """Solve in the paper's sketched dimensions, where that can be shown to be good enough."""


def eq6_at_rank(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: Eq6Options, rank: int) -> AtRank:
    """The printed formula for one rank: from the paper's cross-covariance sketch if asked for (App. C), exactly otherwise.

    ``X R₁`` and ``G R₂`` enter only through their moments, ``R₁ᵀ Σ_xx R₁``, ``R₁ᵀ Σ_xg R₂`` and ``R₂ᵀ Σ_gg R₂``; the problem is
    solved there and its eigenvectors are mapped back by ``R₁``. What they keep of the exact problem is then known, and a bound
    of what the exact eigenvectors would keep beyond it (:mod:`fasc.linalg.sketch`).

    Args:
        weight: rows of all layers of the unit, float64.
        statistics: as for the exact solution.
        options: reading, sketch and tolerance.
        rank: directions that will be kept.
    """
    if not options.sketch:
        return AtRank(fasc_eq6(weight, statistics, options))
    d = weight.shape[1]
    _, covariance_x = as_float64(statistics.input, weight.device)
    covariance_x = covariance_x + EPSILON * torch.eye(d).to(covariance_x)
    statistics.require_cross()
    covariance_g, cross = statistics.require_gradient().at_input(weight)
    assert cross is not None  # noqa: S101 - required above
    width = sketch_width(rank, d, wide=is_wide(weight, statistics, options.threshold))
    chol, failed = torch.linalg.cholesky_ex(covariance_x)
    if width >= d or int(failed):
        return noted(fasc_eq6(weight, statistics, options), exact=True, estimate=0.0, bound=0.0)
    left, right = gaussian(d, width, covariance_x, seed=0), gaussian(d, width, covariance_x, seed=1)
    small_x = left.mT @ covariance_x @ left
    small_cross = left.mT @ cross @ right
    printed = small_cross @ (right.mT @ covariance_g @ right) @ small_cross.mT
    small_chol = torch.linalg.cholesky(small_x)
    half = torch.linalg.solve_triangular(small_chol, (printed + printed.mT) / 2, upper=False)
    energies, rotated = descending_eigh(torch.linalg.solve_triangular(small_chol, half.mT, upper=False))
    v = left @ torch.linalg.solve_triangular(small_chol.mT, rotated, upper=True)

    def apply(block: Tensor) -> Tensor:
        inner = torch.linalg.solve_triangular(chol.mT, block, upper=True)
        image: Tensor = torch.linalg.solve_triangular(chol, cross @ (covariance_g @ (cross.mT @ inner)), upper=False)
        return image

    trace = float(torch.cholesky_solve(cross @ covariance_g @ cross.mT, chol).diagonal().sum())
    basis, _ = torch.linalg.qr(chol.mT @ v[:, :rank])
    pairs = ritz_pairs(apply, basis, trace=trace)
    estimate, bound = pairs.lost_shares(rank, apply)
    if bound > options.tolerance:
        return noted(fasc_eq6(weight, statistics, options), exact=True, estimate=estimate, bound=bound)
    if options.reading == "oblique":
        sketched = Decomposition(down=v.mT, up=weight @ (covariance_x @ v), energies=energies.clamp_min(0))
    else:
        basis, _ = torch.linalg.qr(v)
        sketched = Decomposition(down=basis.mT, up=weight @ basis, energies=energies.clamp_min(0))
    return noted(sketched, exact=False, estimate=estimate, bound=bound)


@method(
    "fasc-eq6",
    scopes=("group",),
    needs={"input", "gradient", "cross"},
    energy_unit="none",
    surrogate="Σ of the dropped eigenvalues of Σ_xg Σ_gg Σ_xgᵀ v = λ (Σ_xx + εI) v",
    reference="arXiv:2601.07197 Eq. 6, B.1, App. C",
    options=Eq6Options,
    at_rank=eq6_at_rank,
)
def fasc_eq6(weight: Float[Tensor, "o i"], statistics: UnitStatistics, options: Eq6Options) -> Decomposition:
    """The paper's Eq. 6 as printed (readings: orthonormal, oblique); kept for comparison, it collapses models."""
    _, covariance_x = as_float64(statistics.input, weight.device)
    printed = _printed_matrix(weight, statistics)
    covariance_x = covariance_x + EPSILON * torch.eye(covariance_x.shape[0]).to(covariance_x)
    if not bool(torch.isfinite(printed).all() and torch.isfinite(covariance_x).all()):
        raise NonFiniteError(f"`{statistics.name}`: Σ_xg Σ_gg Σ_xgᵀ", "check the calibration text and the model's weights")
    values, vectors = descending_eigh(covariance_x)
    kept = int((values > CUTOFF).sum())
    whiten = vectors[:, :kept] / values[:kept].sqrt()
    energies, rotated = descending_eigh(whiten.mT @ printed @ whiten)
    v = whiten @ rotated
    # The directions that the pseudo-inverse leaves out come last and carry no energy, so that full rank stays lossless.
    rest = vectors[:, kept:]
    energies = torch.cat([energies.clamp_min(0), energies.new_zeros(rest.shape[1])])
    if options.reading == "oblique":
        down = torch.cat([v, rest], dim=1).mT
        reconstruct = torch.cat([covariance_x @ v, rest], dim=1)
        return Decomposition(down=down, up=weight @ reconstruct, energies=energies)
    basis, _ = torch.linalg.qr(torch.cat([v, rest], dim=1))
    return Decomposition(down=basis.mT, up=weight @ basis, energies=energies)


def _printed_matrix(weight: Float[Tensor, "o i"], statistics: UnitStatistics) -> Float[Tensor, "i i"]:
    """``Σ_xg Σ_gg Σ_xgᵀ``, from moments on either side."""
    statistics.require_cross()
    covariance_g, cross = statistics.require_gradient().at_input(weight)
    assert cross is not None  # noqa: S101 - required above
    matrix = cross @ covariance_g @ cross.mT
    return (matrix + matrix.mT) / 2
