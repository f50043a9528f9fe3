"""The pivoted form of a low-rank product: k of its rows kept as they are, the others as combinations of them (PIFA).

``W' = up · down`` of rank k has k independent rows. With those rows ``W'_p`` stored as they are, every other row is
``C W'_p``, so ``k (d_in + d_out) − k²`` numbers say what the two factors say with ``k (d_in + d_out)`` (arXiv:2501.19090).

Axes: ``i`` inputs, ``o`` outputs, ``k`` directions, ``n`` the ``o − k`` other rows.
"""

from dataclasses import dataclass

import scipy.linalg
import torch
from jaxtyping import Float, Int
from torch import Tensor

_SINGULAR = 1e-12
"""Relative size of a pivot below which the rows are taken for dependent."""


@dataclass(frozen=True, slots=True)
class PivotedForm:
    """Which rows are kept, and how the others follow from them."""

    pivots: Int[Tensor, " k"]
    """Rows kept, ascending."""

    others: Int[Tensor, " n"]
    """All other rows, ascending."""

    coefficients: Float[Tensor, "n k"]
    """``C``: ``up[others] = C · up[pivots]``."""


def pivoted_form(up: Float[Tensor, "o k"]) -> PivotedForm:
    """Choose ``k`` rows of ``up`` by column-pivoted QR of ``upᵀ`` and express the others in them.

    Greedy pivoting takes at each step the row that is farthest from the span of those taken, which keeps ``C`` small. If the
    coordinates ``down · x`` are white, as they are for every whitening method here, distances are those of the outputs.

    Args:
        up: float64; ``k ≤ o``. Rows of ``W' = up · down`` depend on each other exactly as those of ``up`` do.

    Returns:
        The form; lossless, ``W'[others] = C W'[pivots]``. If ``up`` has dependent columns, ``C`` is the shortest solution.
    """
    k = up.shape[1]
    r, order = scipy.linalg.qr(up.mT.numpy(force=True), mode="r", pivoting=True, check_finite=False)
    size = abs(r.diagonal())
    if k and size[-1] > _SINGULAR * size[0]:
        coefficients = torch.from_numpy(scipy.linalg.solve_triangular(r[:, :k], r[:, k:], check_finite=False)).mT.to(up)
    else:
        coefficients = up[order[k:].copy()] @ torch.linalg.pinv(up[order[:k].copy()])
    pivots, by_pivot = torch.from_numpy(order[:k].astype("int64")).sort()
    others, by_other = torch.from_numpy(order[k:].astype("int64")).sort()
    return PivotedForm(pivots, others, coefficients[by_other][:, by_pivot].contiguous())
