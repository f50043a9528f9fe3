"""Fewer heads, narrower values, no sublayer at all: what stays, and what that costs.

Each is a projector on what one layer reads: it is given ``A x`` in the place of ``x``, and refitted by least squares to what that
says of ``x``. The loss is ``tr((I−TA)ᵀ Q (I−TA) Σ_xx)`` with ``T = Σ Aᵀ (A Σ Aᵀ)⁻¹``; ``A`` selects blocks for heads, is block
diagonal for values, and has no row for a sublayer that is left out.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from fasc.forecast.half_j import half_tails
from fasc.linalg.elimination import eliminate_blocks, estimate_from
from fasc.linalg.psd import cholesky, damped
from fasc.model.attention import Attention
from fasc.model.coupling import Coupling
from fasc.model.groups import stacked_weight
from fasc.processes import current
from fasc.statistics.moments import Statistics, as_float64
from fasc.statistics.reduction import Outputs, Reduction, reduced

Curve = NDArray[np.float64]


def heads_key(consumer: str, count: int) -> str:
    """Name of the forecast of keeping so many key-value heads: ½J, one number."""
    return f"{consumer}/heads/{count}"


def heads_consumer_key(consumer: str, count: int) -> str:
    """Name of the forecast of the consumer then: ½J at each rank, beyond that of the heads."""
    return f"{consumer}/heads/{count}/ranks"


def values_key(consumer: str, count: int, size: int) -> str:
    """Name of the forecast of so many value features in each of so many heads, beyond that of the heads: ½J, one number."""
    return f"{consumer}/heads/{count}/values/{size}"


def value_sizes(width: int) -> list[int]:
    """Features of a value head that a plan may leave, the largest first: eighths of it, down to a half."""
    step = max(1, width // 8)
    return list(range(width - step, width // 2 - 1, -step))


class Values(NamedTuple):
    """The value features of an attention's heads."""

    coupling: Coupling
    producer: str
    """The value projection."""

    heads: int
    """Key-value heads."""


def choose_heads(model: PreTrainedModel, statistics: Statistics, coupling: Coupling, count: int, damping: float) -> Reduction:
    """The key-value heads that stay, with their query heads: others go one by one, each time the one that costs least.

    Args:
        model: as its attention is before.
        statistics: of it.
        coupling: the attention's layers.
        count: how many stay.
        damping: relative, of both covariances.
    """
    with torch.no_grad():
        weight, covariance = _problem(model, statistics, coupling, damping)
        gone = eliminate_blocks(weight, covariance, coupling.parts)[: coupling.parts - count]
        return _of_heads(coupling, covariance, [head for head in range(coupling.parts) if head not in gone])


def _of_heads(coupling: Coupling, covariance: Tensor, stay: Sequence[int]) -> Reduction:
    reads = _selection(stay, coupling.parts, coupling.consumer.d_in).to(covariance)
    rows = {layer.name: _selection(stay, coupling.parts, layer.d_out).to(covariance) for layer in coupling.producers}
    producers = {name: Outputs(one, one.mT) for name, one in rows.items()}
    return Reduction(coupling, reads, estimate_from(covariance, reads), producers)


def _selection(stay: Sequence[int], blocks: int, size: int) -> Tensor:
    """Rows of the identity: the features of the blocks that stay, [kept, size]."""
    return torch.eye(size).view(blocks, size // blocks, size)[list(stay)].flatten(0, 1)


def choose_values(model: PreTrainedModel, statistics: Statistics, values: Values, size: int, damping: float) -> Reduction:
    """The subspace of each value head that stays, chosen where it is read.

    Query heads that share a value head share its subspace: it minimises ``tr((I−P)ᵀ Γ (I−P) C)`` with ``C`` and ``Γ`` the sums
    of their diagonal blocks of ``Σ_xx`` and ``Σ_gg`` at the output projection.

    Args:
        model: as its attention is before.
        statistics: of it.
        values: the heads.
        size: features of each that stay.
        damping: relative, of both covariances.
    """
    with torch.no_grad():
        coupling = values.coupling
        weight, covariance = _problem(model, statistics, coupling, damping)
        width = next(layer.d_out for layer in coupling.producers if layer.name == values.producer) // values.heads
        served = coupling.consumer.d_in // width // values.heads
        seen = (_shared_blocks(matrix, values.heads, served) for matrix in (covariance, weight.mT @ weight))
        maps = [_subspace(one, felt, size, damping) for one, felt in zip(*seen, strict=True)]
        reads = torch.block_diag(*(a for a, _ in maps for _ in range(served)))
        outputs = Outputs(torch.block_diag(*(a for a, _ in maps)), torch.block_diag(*(b for _, b in maps)))
        return Reduction(coupling, reads, estimate_from(covariance, reads), {values.producer: outputs})


def _shared_blocks(matrix: Tensor, heads: int, served: int) -> Tensor:
    """The diagonal blocks of the query heads that share a value head, added up: [heads, width, width]."""
    width = len(matrix) // (heads * served)
    blocks = matrix.view(heads * served, width, heads * served, width).diagonal(dim1=0, dim2=2)
    return blocks.permute(2, 0, 1).view(heads, served, width, width).sum(1)


def _subspace(covariance: Tensor, metric: Tensor, size: int, damping: float) -> tuple[Tensor, Tensor]:
    """``A`` with orthonormal rows, and the estimate ``B`` of all features from ``A x``."""
    left = torch.linalg.cholesky(damped(metric, damping))
    right = torch.linalg.cholesky(damped(covariance, damping))
    directions = torch.linalg.svd(left.mT @ right).Vh[:size]
    rows = torch.linalg.solve_triangular(right, directions, upper=False, left=False)
    basis = torch.linalg.qr(rows.mT).Q.mT.contiguous()
    return basis, estimate_from(right @ right.mT, basis)


def _problem(model: PreTrainedModel, statistics: Statistics, coupling: Coupling, damping: float) -> tuple[Tensor, Tensor]:
    """The consumer's weight in an orthonormal basis of the metric, and the damped Σ_xx; float64."""
    return _problem_of(stacked_weight(model, coupling.consumer.unit()), statistics, coupling, damping)


def _problem_of(weight: Tensor, statistics: Statistics, coupling: Coupling, damping: float) -> tuple[Tensor, Tensor]:
    unit = statistics.unit(coupling.consumer.unit())
    gradient = unit.require_gradient()
    _, metric = as_float64(gradient.covariance, weight.device)
    _, covariance = as_float64(unit.input, weight.device)
    root = cholesky(damped(metric, damping), where=f"`{unit.name}`: the gradients'", tokens=unit.tokens)
    return root.mT @ weight if gradient.side == "output" else root.mT, damped(covariance, damping)


def reduction_loss(weight: Tensor, moments: Statistics, reduction: Reduction) -> float:
    """½J of a reduction by moments that need not be those that chose it; nats per token.

    Args:
        weight: of the consumer before.
        moments: of the model before.
        reduction: what stays.
    """
    unit = moments.unit(reduction.coupling.consumer.unit())
    gradient = unit.require_gradient()
    _, metric = as_float64(gradient.covariance, weight.device)
    _, covariance = as_float64(unit.input, weight.device)
    error = torch.eye(weight.shape[1]).to(weight) - reduction.estimate.to(weight) @ reduction.reads.to(weight)
    error = weight @ error if gradient.side == "output" else error
    return 0.5 * unit.share * float(((error.mT @ metric @ error) * covariance).sum().clamp_min(0))


def attention_curves(
    model: PreTrainedModel,
    attentions: Sequence[Attention],
    damping: float,
    moments: tuple[Statistics, Statistics | None],
    words: frozenset[str],
) -> dict[str, Curve]:
    """Forecasts of every number of heads and of every width of their values.

    Args:
        model: dense.
        attentions: of its blocks.
        damping: relative, of both covariances.
        moments: that choose; and those of held-out text by which the loss is forecast, if any.
        words: of ``heads`` and ``values``, those that are allowed.

    Raises:
        StatisticsError: the statistics lack a gradient moment of a consumer.
    """

    def curves_of(number: int) -> dict[str, Tensor]:
        curves = _curves(model, attentions[number], damping, moments, words)
        return {name: torch.from_numpy(curve) for name, curve in curves.items()}

    costs = [float(attention.coupling.consumer.d_in) ** 3 for attention in attentions]
    with torch.no_grad():
        found = current().each(("forecasting the loss of fewer heads", "attentions"), costs, curves_of)
    return {name: curve.numpy() for name, curve in found.items()}


def _curves(
    model: PreTrainedModel,
    attention: Attention,
    damping: float,
    moments: tuple[Statistics, Statistics | None],
    words: frozenset[str],
) -> dict[str, Curve]:
    coupling, name = attention.coupling, attention.coupling.consumer.name
    weight = stacked_weight(model, coupling.consumer.unit())
    chosen, unseen = moments
    felt, covariance = _problem(model, chosen, coupling, damping)
    order = eliminate_blocks(felt, covariance, coupling.parts) if "heads" in words else []
    curves: dict[str, Curve] = {}
    for count in range(coupling.parts, coupling.parts - len(order) - 1, -1):
        left, judges = (weight, coupling, chosen), unseen
        if count < coupling.parts:
            stay = [head for head in range(coupling.parts) if head not in order[: coupling.parts - count]]
            reduction = _of_heads(coupling, covariance, stay)
            curves[heads_key(name, count)] = np.array([reduction_loss(weight, unseen or chosen, reduction)])
            judges = None if unseen is None else reduced(unseen, reduction)
            left = (weight @ reduction.estimate, *_after(coupling, reduction, chosen))
            curves[heads_consumer_key(name, count)] = _ranks(*left, damping)
        if "values" in words and attention.value is not None:
            curves |= _value_curves(left, attention, count, judges, damping)
    return curves


def _after(coupling: Coupling, reduction: Reduction, statistics: Statistics) -> tuple[Coupling, Statistics]:
    left = reduced(statistics, reduction)
    consumer, group = left.groups[coupling.consumer.name].group, left.groups[coupling.group.name].group
    names = {layer.name for layer in coupling.producers}
    producers = tuple(layer for layer in group.layers if layer.name in names)
    count = coupling.parts * consumer.d_in // coupling.consumer.d_in
    return Coupling("heads", count, group, producers, consumer), left


def _ranks(weight: Tensor, coupling: Coupling, statistics: Statistics, damping: float) -> Curve:
    """½J of the refitted consumer at each rank."""
    felt, covariance = _problem_of(weight, statistics, coupling, damping)
    energies = torch.linalg.eigvalsh(felt @ covariance @ felt.mT).flip(-1).clamp_min(0)
    rank = min(weight.shape)
    share = statistics.unit(coupling.consumer.unit()).share
    return (share * half_tails(energies[:rank])).numpy(force=True)


def _value_curves(
    left: tuple[Tensor, Coupling, Statistics], attention: Attention, count: int, judges: Statistics | None, damping: float
) -> dict[str, Curve]:
    weight, coupling, statistics = left
    assert attention.value is not None  # noqa: S101 - the caller has looked
    felt, covariance = _problem_of(weight, statistics, coupling, damping)
    served = coupling.consumer.d_in // attention.width // count
    seen = [_shared_blocks(matrix, count, served) for matrix in (covariance, felt.mT @ felt)]
    curves: dict[str, Curve] = {}
    for size in value_sizes(attention.width):
        maps = [_subspace(one, metric, size, damping)[0] for one, metric in zip(*seen, strict=True)]
        reads = torch.block_diag(*(a for a in maps for _ in range(served)))
        reduction = Reduction(coupling, reads, estimate_from(covariance, reads), {})
        loss = reduction_loss(weight, judges or statistics, reduction)
        curves[values_key(coupling.consumer.name, count, size)] = np.array([loss])
    return curves


def loss_of_leaving_out(curves: Mapping[str, Curve], last: str) -> float | None:
    """½J of a sublayer that is left out: that of rank 0 of its last layer, whose mean stays."""
    return float(curves[last][0]) if last in curves else None
