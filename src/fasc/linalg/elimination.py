"""Which input features of a layer can go, with the layer refitted to those that stay: coordinates as a subspace.

A projector ``P`` whose image is spanned by the kept features of ``x`` needs nothing of the others, so whatever computes those
need not exist any more. For the metric ``Q`` on the inputs the loss of keeping ``S`` and refitting by least squares is
``tr((I−T)ᵀ Q (I−T) Σ_xx)`` with ``T`` the regression of ``x`` on ``x_S``. Features are removed one after the other, each time the
one whose removal adds least: with ``Λ = Σ_SS⁻¹`` and ``A`` the refitted weight in an orthonormal basis of the metric, removing
``j`` adds ``‖A_j‖² / Λ_jj`` (the optimal brain surgeon's formula, exact for a quadratic loss).

Axes: ``i`` input features, ``o`` outputs in the basis of the metric.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_TOGETHER = 16
"""Features removed between two updates of the whole matrices."""

_LOOKED_AT = 48
"""Features among which those are chosen, one after the other with exact updates of their own."""

_SHRINK = 0.75
"""Share of the features that is left when the matrices are cut down to them."""


@dataclass(frozen=True, slots=True)
class Elimination:
    """An order in which to remove features."""

    order: Int[Tensor, " removed"]
    """Features, the first removed first."""

    residuals: Float[Tensor, "removed o"]
    """What each removal adds to the error, as a vector ``u`` in the basis of the metric: the error's covariance is ``Σ u uᵀ``."""

    def losses(self) -> Float[Tensor, " removed1"]:
        """Loss after each number of removals, from none on."""
        added = self.residuals.square().sum(1)
        return torch.cat([added.new_zeros(1), added.cumsum(0)])

    def kept(self, count: int, size: int) -> Int[Tensor, " count"]:
        """The ``count`` features of ``size`` that are left, ascending."""
        alive = torch.ones(size, dtype=torch.bool)
        alive[self.order[: size - count]] = False
        return alive.nonzero().flatten()


def eliminate(weight: Float[Tensor, "o i"], covariance_x: Float[Tensor, "i i"], fewest: int) -> Elimination:
    """Remove features one by one, refitting the weight to the others, until ``fewest`` are left.

    Args:
        weight: in an orthonormal basis of the metric: ``Rᵀ W`` for ``M = R Rᵀ`` on the outputs.
        covariance_x: ``Σ_xx``, positive definite (damped).
        fewest: features left at the end.
    """
    a, precision = weight.clone(), torch.cholesky_inverse(torch.linalg.cholesky(covariance_x))
    names = torch.arange(weight.shape[1], device=weight.device)
    gone = torch.zeros_like(names, dtype=torch.bool)
    order, residuals = [names[:0]], [weight.new_zeros(0, weight.shape[0])]
    left = len(names)
    while left > fewest:
        picked, factor = _next(a, precision, gone, min(_TOGETHER, left - fewest))
        order.append(names[picked])
        # With P the block of the precision of those that go: A ← A − A_p P⁻¹ Λ_p, the same as one after the other.
        residuals.append(torch.linalg.solve_triangular(factor, a[:, picked].mT, upper=False))
        rows = torch.linalg.solve_triangular(factor, precision[picked], upper=False)
        a.addmm_(residuals[-1].mT, rows, alpha=-1)
        precision.addmm_(rows.mT, rows, alpha=-1)
        gone[picked] = True
        left -= len(picked)
        if left < _SHRINK * len(names):
            names, a, precision = names[~gone], a[:, ~gone].contiguous(), precision[~gone][:, ~gone].contiguous()
            gone = gone[~gone]
    return Elimination(torch.cat(order).cpu(), torch.cat(residuals))


def _next(
    a: Float[Tensor, "o i"], precision: Float[Tensor, "i i"], gone: Bool[Tensor, " i"], count: int
) -> tuple[Int[Tensor, " count"], Float[Tensor, "count count"]]:
    """The next features to go, in order, and the Cholesky factor of their block of the precision."""
    scores = (a.square().sum(0) / precision.diagonal()).masked_fill(gone, torch.inf)
    near = scores.topk(min(_LOOKED_AT, int((~gone).sum())), largest=False).indices
    gram, block = (a[:, near].mT @ a[:, near]).cpu(), precision[near][:, near].cpu()
    chosen: list[int] = []
    for _ in range(count):
        now = gram.diagonal() / block.diagonal()
        now[chosen] = torch.inf
        j = int(now.argmin())
        chosen.append(j)
        row = block[j] / block[j, j]
        gram = gram - torch.outer(gram[:, j], row) - torch.outer(row, gram[j]) + gram[j, j] * torch.outer(row, row)
        block = block - torch.outer(block[:, j], row)
    picked = near[torch.tensor(chosen, device=near.device)]
    factor: Tensor = torch.linalg.cholesky(precision[picked][:, picked])
    return picked, factor


def refit(covariance_x: Float[Tensor, "i i"], kept: Int[Tensor, " k"]) -> Float[Tensor, "i k"]:
    """``T = Σ_xS Σ_SS⁻¹``: the best linear estimate of all features from those kept is ``T x_S``."""
    chol = torch.linalg.cholesky(covariance_x[kept][:, kept])
    found: Tensor = torch.cholesky_solve(covariance_x[kept], chol).mT
    return found


def eliminate_blocks(weight: Float[Tensor, "o i"], covariance_x: Float[Tensor, "i i"], blocks: int) -> list[int]:
    """The order in which blocks of neighbouring features go, each time the one that costs least, until one is left.

    Args:
        weight: in an orthonormal basis of the metric.
        covariance_x: ``Σ_xx``, positive definite (damped).
        blocks: how many of one size there are.
    """
    a, precision = weight.clone(), torch.cholesky_inverse(torch.linalg.cholesky(covariance_x))
    members = torch.arange(weight.shape[1], device=weight.device).view(blocks, -1)
    order: list[int] = []
    while len(order) < blocks - 1:
        left = [block for block in range(blocks) if block not in order]
        removed = {block: _removal(a, precision, members[block]) for block in left}
        least = min(left, key=lambda block: float(removed[block].square().sum()))
        rows = torch.linalg.solve_triangular(
            torch.linalg.cholesky(precision[members[least]][:, members[least]]), precision[members[least]], upper=False
        )
        a = a - removed[least].mT @ rows
        precision = precision - rows.mT @ rows
        order.append(least)
    return order


def _removal(a: Float[Tensor, "o i"], precision: Float[Tensor, "i i"], block: Int[Tensor, " b"]) -> Float[Tensor, "b o"]:
    """What the removal of a block adds to the error, in the basis of the metric."""
    factor = torch.linalg.cholesky(precision[block][:, block])
    found: Tensor = torch.linalg.solve_triangular(factor, a[:, block].mT, upper=False)
    return found


def estimate_from(covariance_x: Float[Tensor, "i i"], reads: Float[Tensor, "k i"]) -> Float[Tensor, "i k"]:
    """``T = Σ Aᵀ (A Σ Aᵀ)⁻¹``: the best linear estimate of all features from ``A x`` is ``T A x``."""
    cross = covariance_x @ reads.mT
    found: Tensor = torch.cholesky_solve(cross.mT, torch.linalg.cholesky(reads @ cross)).mT
    return found
