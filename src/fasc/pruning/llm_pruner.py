"""LLM-Pruner: whole heads and channels by a first-order Taylor estimate of what they carry."""

from torch import Tensor

from fasc.pruning._registry import Structured, register
from fasc.statistics.moments import GroupStatistics


def taylor_importance(consumer: GroupStatistics, parts: int) -> Tensor:
    """``Σ_j E_s |Σ_t x_tj ∂L/∂x_tj|`` over a part's columns ``j`` of the consumer: the vector-wise first-order Taylor estimate.

    For a column of the consumer's weight ``Σ_o W_oj ∂L/∂W_oj = Σ_t x_tj (Wᵀh)_tj``, and the same number is that of the producer's
    row it is made from, so one moment of the consumer's inputs says what removing the part does to the loss.

    Returns:
        [parts], nats per sequence.

    Raises:
        StatisticsError: the moment was not collected.
    """
    return consumer.unit(consumer.group.name).require_extra("taylor").view(parts, -1).sum(1)


register(
    Structured(
        name="llm-pruner",
        moments=frozenset({"taylor"}),
        surrogate="|Σ_t x_tj ∂L/∂x_tj|",
        reference="arXiv:2305.11627 (LLM-Pruner), Eq. 3, vector-wise, without recovery training",
        summary="Structured pruning: whole heads and MLP channels of the least first-order Taylor importance go (LLM-Pruner).",
        importance=taylor_importance,
    )
)
