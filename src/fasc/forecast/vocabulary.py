"""What rounding the embedding and the head costs: ½J at both ends of a model.

The error ``e_o`` of token ``o``'s row is felt where the token is read, with its frequency and the metric of the gradients there,
and where it may be said, with the mean square of its logit's gradient and the moment of what the head reads:
``½ Σ_o (f_o e_oᵀ Γ e_o + E[h_o²] e_oᵀ C e_o)``. A tied matrix has both terms, a matrix of its own one.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.forecast.rounding import rounding_loss, rounding_share
from fasc.linalg.rounding import Feedback, feedback
from fasc.model.vocabulary import Vocabulary
from fasc.statistics.vocabulary import VocabularyMoments

End = Literal["embedding", "head", "both"]


class Felt(NamedTuple):
    """One way in which a row's error is felt."""

    weights: Float[Tensor, " v"]
    """Of each row."""

    metric: Float[Tensor, "d d"]


def ends_of(vocabulary: Vocabulary) -> tuple[End, ...]:
    """The matrices of a vocabulary."""
    return ("both",) if vocabulary.tied else ("embedding", "head")


def felt_at(moments: VocabularyMoments, end: End) -> list[Felt]:
    """How the errors of a matrix are felt."""
    read, said = Felt(moments.frequency, moments.gradient), Felt(moments.scale, moments.input)
    return {"embedding": [read], "head": [said], "both": [read, said]}[end]


def feedback_at(moments: VocabularyMoments, end: End, damping: float) -> Feedback:
    """What rounding needs: one metric for all rows, each way of being felt by the sum of its weights."""
    metric = sum(one.weights.double().sum() * one.metric.double() for one in felt_at(moments, end))
    assert isinstance(metric, Tensor)  # noqa: S101 - there is at least one
    return feedback(metric, damping, where=f"the {end} of the vocabulary", tokens=0)


def vocabulary_noise(weight: Float[Tensor, "v d"], moments: VocabularyMoments, end: End, group: int, damping: float) -> float:
    """The forecast at one step for the whole range of each group, in nats per token; times ``rounding_share(bits)``.

    Errors with feedback are ``Σ_i (ε_i / U_ii) U_i`` with ``ε_i`` uniform within a step.
    """
    inputs = feedback_at(moments, end, damping)
    ranges = _ranges(weight, group)
    total = 0.0
    for weights, metric in felt_at(moments, end):
        ordered = metric.double()[inputs.order][:, inputs.order].to(inputs.factor)
        spread = torch.empty(len(ordered), dtype=torch.float64)
        seen = ((inputs.factor @ ordered) * inputs.factor).sum(1) / inputs.factor.diagonal().square()
        spread[inputs.order.cpu()] = seen.cpu()
        padded = torch.nn.functional.pad(spread, (0, ranges.shape[1] * group - len(spread)))
        total += float(weights.double() @ (ranges.square() @ padded.view(-1, group).sum(1)))
    return total / 24


def _ranges(weight: Float[Tensor, "v d"], group: int) -> Float[Tensor, "v g"]:
    rows, width = weight.shape
    groups = -(-width // group)
    padded = torch.nn.functional.pad(weight.float().cpu(), (0, groups * group - width)).view(rows, groups, group)
    return (padded.amax(-1).clamp_min(0) - padded.amin(-1).clamp_max(0)).double()


def vocabulary_loss(noise: float, bits: int) -> float:
    """½J in so many bits."""
    return noise * rounding_share(bits)


def measured_loss(error: Float[Tensor, "v d"], moments: VocabularyMoments, end: End) -> float:
    """½J of an error that was made."""
    return sum(rounding_loss(error, one.metric.to(error), one.weights.to(error)) for one in felt_at(moments, end))
