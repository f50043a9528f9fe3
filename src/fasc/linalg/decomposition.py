"""Low-rank forms of a weight: the full ordered decomposition, its truncation, and the two solvers behind every method.

Every subspace method here minimises ``tr((W−W')ᵀ M (W−W') Σ_xx)`` for some metric ``M`` on the outputs, or the same
quantity written on the inputs, ``tr(Aᵀ Q A Σ_xx)`` with ``W' = W(I−A)`` and ``Q = Wᵀ M W``. Eckart–Young solves both. One
is solved on the ``d_in`` side, the other on the ``d_out`` side; take the smaller.

Axes: ``i`` inputs, ``o`` outputs, ``r`` directions.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.linalg.psd import descending_eigh

_PANEL = 4096
"""Columns of a covariance that are brought to the precision of the algebra at a time."""


def conjugated(a: Float[Tensor, "r i"], covariance: Float[Tensor, "i i"]) -> Float[Tensor, "r r"]:
    """``A Σ Aᵀ`` in the precision of ``A``; a wide ``Σ`` of another is converted in panels, so that no copy of it is made."""
    total: Tensor | None = None
    for start in range(0, len(covariance), _PANEL):
        columns = slice(start, start + _PANEL)
        part = (a @ covariance[:, columns].to(a)) @ a[:, columns].mT
        total = part if total is None else total.add_(part)
    return a.new_zeros(len(a), len(a)) if total is None else total


@dataclass(frozen=True, slots=True)
class Factorization:
    """A truncated decomposition ``W ≈ up · down`` with the correction of the mean."""

    down: Float[Tensor, "k i"]
    up: Float[Tensor, "o k"]
    offset: Float[Tensor, " o"]
    """``(W − up·down) μ_x``: added to the bias so that the mean output is kept exactly."""

    def dense(self) -> Float[Tensor, "o i"]:
        """``up · down``."""
        return self.up @ self.down


@dataclass(frozen=True, slots=True)
class Decomposition:
    """A full decomposition ``W = up · down``, most valuable direction first. It never sees a rank.

    At full rank it equals the weight; ``energies[j]`` is what the method's surrogate loses if direction ``j`` is dropped
    after all later ones have been.
    """

    down: Float[Tensor, "r i"]
    up: Float[Tensor, "o r"]
    energies: Float[Tensor, " r"]
    """Non-negative, descending; their unit is the method's ``energy_unit``."""

    @property
    def full_rank(self) -> int:
        """How many directions there are."""
        return self.energies.shape[0]

    def truncate(self, rank: int, mean: Float[Tensor, " i"], target_mean: Float[Tensor, " o"] | None = None) -> Factorization:
        """Keep the first ``rank`` directions; what the others did to the mean input becomes a constant.

        Args:
            rank: between 1 and ``full_rank``.
            mean: ``μ_x``. The map becomes ``x ↦ μ_x + P(x − μ_x)`` followed by ``W``.
            target_mean: mean that the output shall have without the layer's own bias; ``up · down · μ_x`` if not given.
        """
        down, up = self.down[:rank], self.up[:, :rank]
        if target_mean is None:
            return Factorization(down=down, up=up, offset=self.up[:, rank:] @ (self.down[rank:] @ mean))
        return Factorization(down=down, up=up, offset=target_mean - up @ (down @ mean))


def decompose_on_inputs(
    weight: Float[Tensor, "o i"], chol_x: Float[Tensor, "i i"], metric: Float[Tensor, "i i"]
) -> Decomposition:
    """Minimise ``tr(Aᵀ Q A Σ_xx)``, ``A = I − P``, over projectors ``P`` of each rank, on the ``d_in`` side.

    With ``Σ_xx = L Lᵀ`` and ``Lᵀ Q L = V S² Vᵀ`` the optimum is ``P_k = L V_k V_kᵀ L⁻¹``; no inverse of ``Q`` is needed, so a
    singular metric is no problem.

    Args:
        weight: ``W``.
        chol_x: ``L``, the lower Cholesky factor of ``Σ_xx`` (damped).
        metric: ``Q``: ``Σ_gg`` for the Fisher objective, the identity for activation PCA.
    """
    energies, v = descending_eigh(chol_x.mT @ metric @ chol_x)
    down = torch.linalg.solve_triangular(chol_x.mT, v, upper=True).mT
    return Decomposition(down=down, up=weight @ (chol_x @ v), energies=energies.clamp_min(0))


def energies_on_inputs(chol_x: Float[Tensor, "i i"], metric: Float[Tensor, "i i"]) -> Float[Tensor, " i"]:
    """The energies of :func:`decompose_on_inputs` alone, in a third of its time: no eigenvectors."""
    values: Tensor = torch.linalg.eigvalsh(chol_x.mT @ metric @ chol_x)
    return values.flip(-1).clamp_min(0)


def energies_on_outputs(
    weight: Float[Tensor, "o i"], covariance_x: Float[Tensor, "i i"], chol_metric: Float[Tensor, "o o"]
) -> Float[Tensor, " o"]:
    """The energies of :func:`decompose_on_outputs` alone."""
    rotated = chol_metric.mT @ weight
    values: Tensor = torch.linalg.eigvalsh(conjugated(rotated, covariance_x))
    return values.flip(-1).clamp_min(0)


def decompose_on_outputs(
    weight: Float[Tensor, "o i"],
    covariance_x: Float[Tensor, "i i"],
    chol_metric: Float[Tensor, "o o"] | None,
) -> Decomposition:
    """Minimise ``tr((W−W')ᵀ M (W−W') Σ_xx)`` over ``W'`` of each rank, on the ``d_out`` side.

    With ``M = R Rᵀ`` and ``Rᵀ W Σ_xx Wᵀ R = U S² Uᵀ`` the optimum is ``W'_k = R⁻ᵀ U_k U_kᵀ Rᵀ W``; no inverse of ``Σ_xx``
    is needed, so it may be singular.

    Args:
        weight: ``W``.
        covariance_x: ``Σ_xx``, in any precision.
        chol_metric: ``R``, the lower Cholesky factor of ``M`` (``Σ_hh``, damped); ``None`` for the identity.
    """
    rotated = weight if chol_metric is None else chol_metric.mT @ weight
    energies, u = descending_eigh(conjugated(rotated, covariance_x))
    up = u if chol_metric is None else torch.linalg.solve_triangular(chol_metric.mT, u, upper=True)
    return Decomposition(down=u.mT @ rotated, up=up, energies=energies.clamp_min(0))
