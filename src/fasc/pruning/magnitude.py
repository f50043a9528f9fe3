"""Magnitude pruning: the paper's MagPrune baseline."""

from torch import Tensor

from fasc.pruning._registry import Unstructured, register
from fasc.statistics.moments import GroupStatistics


def magnitude(weight: Tensor, statistics: GroupStatistics) -> Tensor:
    """``|W_oi|``, [d_out, d_in]."""
    del statistics
    return weight.abs()


register(
    Unstructured(
        name="magnitude",
        moments=frozenset(),
        surrogate="|W_oi|",
        reference="arXiv:1506.02626 (Han et al. 2015)",
        summary="Unstructured pruning by magnitude: the smallest weights of each layer become zeros.",
        score=magnitude,
        by_row=False,
    )
)
