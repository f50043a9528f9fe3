"""Which groups the paper leaves out of its scores, applied to the rows of a diagnosis."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

_NEAR_CONSTANT = 1e-4
"""‖Σ_gg‖_F below this share of the median over groups. The paper's 1e-4 is absolute; gradients have no absolute scale."""

_EARLY_BLOCKS = 3


def excluded(rows: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """Why each group is excluded, or ``None`` (arXiv:2601.07197 App. C).

    Near-constant gradients, the attention of blocks 0 to 2, and the output projections of the last block (its groups
    of one layer, which write to the residual stream).

    Args:
        rows: with ``group``, ``block``, ``layers``, ``gradient_norm``.
    """
    norms = [row["gradient_norm"] for row in rows if row["gradient_norm"] is not None]
    usual = median(norms) if norms else 0.0
    blocks = [row["block"] for row in rows if row["block"] is not None]
    last = max(blocks, default=-1)
    return [_reason(row, usual, last) for row in rows]


def _reason(row: Mapping[str, Any], usual: float, last: int) -> str | None:
    if row["gradient_norm"] is not None and row["gradient_norm"] < _NEAR_CONSTANT * usual:
        return "near-constant gradients"
    if row["block"] is not None and row["block"] < _EARLY_BLOCKS and "att" in row["group"].lower():
        return f"attention of blocks 0-{_EARLY_BLOCKS - 1}"
    if row["block"] == last and len(row["layers"]) == 1:
        return "output projection of the last block"
    return None
