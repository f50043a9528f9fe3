"""Wanda: pruning by weights and activations."""

from torch import Tensor

from fasc.statistics.moments import GroupStatistics
from fasc.pruning._unstructured import unstructured


@unstructured(
    "wanda", needs=frozenset(), surrogate="|W_oi| · (E x_i²)^½", reference="arXiv:2306.11695 (Wanda), Eq. 1", by_row=True
)
def wanda(weight: Tensor, statistics: GroupStatistics) -> Tensor:
    """Unstructured pruning by |weight| × norm of its input, within each output (Wanda)."""
    inputs = statistics.input
    second = inputs.matrix.diagonal() + inputs.mean.square()
    return weight.abs() * second.clamp_min(0).sqrt().to(weight)
