"""Wanda: pruning by weights and activations."""

from torch import Tensor

from fasc.pruning._registry import Unstructured, register
from fasc.statistics.moments import GroupStatistics


def wanda(weight: Tensor, statistics: GroupStatistics) -> Tensor:
    """``|W_oi| · (E x_i²)^½``, [d_out, d_in]."""
    inputs = statistics.input
    second = inputs.matrix.diagonal() + inputs.mean.square()
    return weight.abs() * second.clamp_min(0).sqrt().to(weight)


register(
    Unstructured(
        name="wanda",
        moments=frozenset(),
        surrogate="|W_oi| · (E x_i²)^½",
        reference="arXiv:2306.11695 (Wanda), Eq. 1",
        summary="Unstructured pruning by |weight| × norm of its input, within each output (Wanda).",
        score=wanda,
        by_row=True,
    )
)
