"""Leading eigenpairs of a positive semidefinite operator from a randomised sketch, and what the sketch may have lost.

A randomised range finder with power iterations (Halko, Martinsson & Tropp 2011): an orthonormal basis ``Q`` of ``A^{q+1} Ω``
with ``m`` columns, then the eigenpairs of ``QᵀAQ``. The operator is only applied to blocks of vectors, never formed.

What the sketch lost is known afterwards. With ``A`` split by ``Q`` into diagonal blocks ``QᵀAQ`` and ``E``, Ky Fan norms obey
``Σ_{j≤k} λ_j(A) ≤ Σ_{j≤k} θ_j + Σ_{j≤k} λ_j(E)`` (Lee 2010), so the energy lost against the optimum is at most the sum of the
``k`` largest eigenvalues of ``E``. That is at most ``tr E = tr A − tr QᵀAQ``, which is exact and free, and at most ``k ‖E‖``,
which a few random vectors bound with high probability.

Axes: ``d`` features, ``m`` sketch, ``k`` rank.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.linalg.psd import descending_eigh

PROBES = 10
"""Random vectors of the bound: it fails with probability 10⁻¹⁰."""

SAFETY = 10
"""Factor between the largest norm that the probes see and the bound (Halko et al. 2011, §4.3)."""

Apply = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class SketchedEigenpairs:
    """Ritz pairs, largest first."""

    values: Float[Tensor, " m"]
    vectors: Float[Tensor, "d m"]
    trace: float
    """Of the whole operator."""

    outside: float
    """Bound of the largest eigenvalue of the operator outside the sketch; holds with probability 1 − 10⁻¹⁰."""

    def dropped(self, rank: int) -> float:
        """Energy that keeping ``rank`` pairs drops: exact, ``tr A − Σ_{j≤k} θ_j``."""
        return max(0.0, self.trace - float(self.values[:rank].sum()))

    def lost_bound(self, rank: int) -> float:
        """At most so much of it would have been kept by the exact solution (with that probability)."""
        return min(self.dropped(self.values.shape[0]), rank * self.outside)

    def lost_shares(self, rank: int, apply: Apply) -> tuple[float, float]:
        """Estimate and bound of the energy lost, ÷ energy dropped; ``apply`` is the operator of these pairs."""
        dropped = max(self.dropped(rank), torch.finfo(torch.float64).tiny)
        return self.lost_estimate(rank, residual_norms(apply, self)) / dropped, self.lost_bound(rank) / dropped

    def lost_estimate(self, rank: int, residuals: Float[Tensor, " m"]) -> float:
        """Second-order estimate of the same: ``Σ_j ‖r_j‖² / (θ_j − ‖E‖)``, each term at most ``‖E‖`` as the probes saw it.

        Args:
            rank: pairs kept.
            residuals: ``‖A v_j − θ_j v_j‖`` of each pair, see :func:`residual_norms`.
        """
        seen = self.outside / SAFETY
        gaps = (self.values[:rank] - seen).clamp_min(torch.finfo(self.values.dtype).tiny)
        return min(float((residuals[:rank].square() / gaps).clamp_max(seen).sum()), self.lost_bound(rank))


def sketched_eigenpairs(
    apply: Apply, start: Float[Tensor, "d m"], *, trace: float, power: int = 2, seed: int = 0
) -> SketchedEigenpairs:
    """Leading eigenpairs of ``A`` from a sketch of ``m`` random vectors.

    Args:
        apply: ``V ↦ A V``, for ``A`` symmetric positive semidefinite.
        start: ``Ω``, random.
        trace: ``tr A``.
        power: power iterations; each orthonormalises once.
        seed: of the vectors that bound what is outside.
    """
    basis, _ = torch.linalg.qr(apply(start))
    for _ in range(power):
        basis, _ = torch.linalg.qr(apply(basis))
    return ritz_pairs(apply, basis, trace=trace, seed=seed)


def ritz_pairs(apply: Apply, basis: Float[Tensor, "d m"], *, trace: float, seed: int = 0) -> SketchedEigenpairs:
    """The best that a subspace holds of an operator, and a bound of what lies outside.

    Args:
        apply: ``V ↦ A V``, for ``A`` symmetric positive semidefinite.
        basis: orthonormal columns.
        trace: ``tr A``.
        seed: of the vectors that bound what is outside.
    """
    image = apply(basis)
    small = basis.mT @ image
    values, rotation = descending_eigh((small + small.mT) / 2)
    generator = torch.Generator().manual_seed(seed)
    probes = torch.randn(basis.shape[0], PROBES, generator=generator, dtype=torch.float64).to(basis)
    probes = probes - basis @ (basis.mT @ probes)
    rest = apply(probes)
    rest = rest - basis @ (basis.mT @ rest)
    outside = SAFETY * sqrt(2 / pi) * float(torch.linalg.vector_norm(rest, dim=0).max())
    vectors: Tensor = basis @ rotation
    return SketchedEigenpairs(values.clamp_min(0), vectors, trace, outside)


def residual_norms(apply: Apply, pairs: SketchedEigenpairs) -> Float[Tensor, " m"]:
    """``‖A v_j − θ_j v_j‖`` of each Ritz pair."""
    norms: Tensor = torch.linalg.vector_norm(apply(pairs.vectors) - pairs.vectors * pairs.values, dim=0)
    return norms


def gaussian(rows: int, columns: int, like: Tensor, *, seed: int) -> Float[Tensor, "d m"]:
    """``N(0, 1/m)`` entries, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    entries: Tensor = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return entries.div(columns**0.5).to(like)


def sketch_width(rank: int, dimension: int, *, wide: bool) -> int:
    """The paper's sizes (arXiv:2601.07197 App. C): ``2k``, or ``min(4k, d/2)`` where ρ is high; between ``k + 8`` and ``d``."""
    width = min(4 * rank, dimension // 2) if wide else 2 * rank
    return min(dimension, max(width, rank + 8))
