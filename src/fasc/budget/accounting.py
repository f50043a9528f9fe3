"""Parameters ↔ rank: what each way to store a unit costs."""

from typing import Literal

from fasc.errors import BudgetError

StoredLayout = Literal["factors", "merged"]
"""``factors``: ``down`` and ``up``. ``merged``: their product, as one dense matrix, because that is not larger."""


def factor_parameters(rank: int, d_in: int, d_out: int) -> int:
    """Weights of two factors with one shared projector: ``k (d_in + Σ d_out)``."""
    return rank * (d_in + d_out)


def dense_parameters(d_in: int, d_out: int) -> int:
    """Weights of the dense layers: ``d_in · Σ d_out``."""
    return d_in * d_out


def break_even_rank(d_in: int, d_out: int) -> float:
    """Rank at which the factors cost as much as the dense layers: ``d_in d_out / (d_in + d_out)``."""
    return d_in * d_out / (d_in + d_out)


def stored_layout(rank: int, d_in: int, d_out: int) -> StoredLayout:
    """Factors below break-even, their dense product from there on: no unit is ever stored above its dense size."""
    return "factors" if rank < break_even_rank(d_in, d_out) else "merged"


def rank_for_fraction(rank_fraction: float, d_in: int, d_out: int, *, members: int) -> int | None:
    """The rank of a unit at a rank fraction; ``None`` at fraction 1, which keeps every direction.

    Args:
        rank_fraction: ``k / min(d_in, d_out)``; for a projector shared by several layers ``k / d_in``.
        d_in: features of the input.
        d_out: output features of all layers of the unit.
        members: how many layers share the projector.

    Raises:
        BudgetError: outside (0, 1], or less than one direction is left.
    """
    if not 0 < rank_fraction <= 1:
        raise BudgetError(f"rank fraction is {rank_fraction:g}, outside (0, 1]", "0.5 keeps half the rank of every layer")
    if rank_fraction == 1:
        return None
    whole = d_in if members > 1 else min(d_in, d_out)
    rank = int(rank_fraction * whole + 1e-9)
    if rank == 0:
        raise BudgetError(
            f"rank fraction {rank_fraction:g} leaves no direction of a {d_out}×{d_in} layer",
            f"use at least {1 / whole:.4f}",
        )
    return rank
