"""Magnitude pruning: the paper's MagPrune baseline."""

from torch import Tensor

from fasc.statistics.moments import GroupStatistics
from fasc.pruning._unstructured import unstructured


@unstructured("magnitude", needs=frozenset(), surrogate="|W_oi|", reference="arXiv:1506.02626 (Han et al. 2015)", by_row=False)
def magnitude(weight: Tensor, statistics: GroupStatistics) -> Tensor:
    """Unstructured pruning by magnitude: the smallest weights of each layer become zeros."""
    del statistics
    return weight.abs()
