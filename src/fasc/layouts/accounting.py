"""Parameters ↔ rank: what each way to store a unit costs."""

from typing import Literal

Layout = Literal["dense", "factors", "shared", "pivoted", "pivoted-columns", "merged", "sparse", "narrow"]
"""How a unit is stored.

``dense``: as it was. ``factors``: ``down`` and ``up`` of one layer. ``shared``: one ``down`` for the layers that read the same
tensor, an ``up`` for each. ``pivoted``: k output rows as they are and the others as combinations of them (PIFA, a row
interpolative decomposition). ``pivoted-columns``: the same of the columns, k inputs as they are. ``merged``: the product as one
dense matrix, for a rank at which no other allowed layout is smaller. By pruning: ``sparse``, dense with zeros in it; ``narrow``,
dense with fewer inputs or outputs.
"""

ORDER_BYTES = 4
"""Of an entry of a pivoted unit's ``order`` (int32)."""


def factor_parameters(rank: int, d_in: int, d_out: int) -> int:
    """Weights of two factors with one shared projector: ``k (d_in + Σ d_out)``."""
    return rank * (d_in + d_out)


def pivoted_parameters(rank: int, d_in: int, d_out: int) -> int:
    """Weights of either pivoted form: ``k (d_in + Σ d_out) − k²`` (arXiv:2501.19090)."""
    return rank * (d_in + d_out) - rank * rank


def dense_parameters(d_in: int, d_out: int) -> int:
    """Weights of the dense layers: ``d_in · Σ d_out``."""
    return d_in * d_out


def break_even_rank(d_in: int, d_out: int) -> float:
    """Rank at which the factors cost as much as the dense layers: ``d_in d_out / (d_in + d_out)``."""
    return d_in * d_out / (d_in + d_out)


def stored_parameters(layout: Layout, rank: int, d_in: int, d_out: int, *, dense_biases: int) -> int:
    """Everything that is stored: weights, the bias that holds the correction of the mean, a pivoted unit's order.

    Args:
        layout: how the unit is stored.
        rank: directions kept.
        d_in: features of the input.
        d_out: output features of all layers of the unit.
        dense_biases: bias entries the dense layers have.
    """
    if layout == "dense":
        return dense_parameters(d_in, d_out) + dense_biases
    if layout == "merged":
        return dense_parameters(d_in, d_out) + d_out
    if layout in {"pivoted", "pivoted-columns"}:
        return pivoted_parameters(rank, d_in, d_out) + d_out + order_entries(layout, d_in, d_out)
    return factor_parameters(rank, d_in, d_out) + d_out


def order_entries(layout: Layout, d_in: int, d_out: int) -> int:
    """Entries of ``stored_parameters`` that are int32 whatever the precision of the weights."""
    return {"pivoted": d_out, "pivoted-columns": d_in}.get(layout, 0)
