"""What rounding a weight costs: ½J with the diagonal of the outputs' metric.

For an error ``E`` of a layer ½J is ``½ tr(Eᵀ M E Σ)`` with ``M = E[h hᵀ]``. Rounding gives errors that are nearly independent
from row to row, so that what stands off the diagonal of ``M`` averages out: ``½ Σ_o E[h_o²] e_oᵀ Σ e_o``.

Before anything is rounded, a step ``s`` is noise of variance ``s²/12``. With error feedback the noise of input ``i`` counts by
its variance given the inputs that are rounded after it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from fasc.layouts import FactoredLayout
from fasc.layouts.quantised import linear_maps
from fasc.linalg.decomposition import Factorization
from fasc.linalg.rounding import variances
from fasc.model.groups import Unit
from fasc.statistics.moments import UnitStatistics


def rounding_loss(
    error: Float[Tensor, "o i"], moment: Float[Tensor, "i i"], scale: Float[Tensor, " o"], share: float = 1.0
) -> float:
    """π · ½ Σ_o E[h_o²] e_oᵀ Σ e_o, in nats per token of text.

    Args:
        error: ``W − W'``, [d_out, d_in].
        moment: ``Σ`` of the inputs: the second moment, or the covariance where a bias makes good the mean.
        scale: ``E[h_o²]`` of every output, nats² per token.
        share: of the tokens that reach the layer.
    """
    e = error.double()
    return 0.5 * share * float(scale.to(e) @ ((e @ moment.to(e)) * e).sum(1))


def noise_loss(
    weight: Float[Tensor, "o i"], spread: Float[Tensor, " i"], scale: Float[Tensor, " o"], group: int, share: float = 1.0
) -> float:
    """The forecast of :func:`rounding_loss` at one step for the whole range of each group: divide it by ``(2^bits − 1)²``.

    Args:
        weight: to be rounded.
        spread: variance of each input given those that are rounded after it, from :func:`~fasc.linalg.rounding.variances`.
        scale: ``E[h_o²]`` of every output.
        group: inputs that share a scale.
        share: of the tokens that reach the layer.
    """
    d_out, d_in = weight.shape
    groups = -(-d_in // group)
    padded = torch.nn.functional.pad(weight, (0, groups * group - d_in)).view(d_out, groups, group)
    ranges = (padded.amax(-1).clamp_min(0) - padded.amin(-1).clamp_max(0)).double()
    spreads = torch.nn.functional.pad(spread, (0, groups * group - d_in)).view(groups, group).sum(1)
    return share * float(scale.to(ranges) @ (ranges.square() @ spreads.to(ranges))) / 24


class Rounding(NamedTuple):
    """How weights are rounded: what the forecast depends on beside the moments."""

    group: int
    damping: float


def factored_noise(
    unit: Unit, stored: tuple[FactoredLayout, Factorization], moments: UnitStatistics, scales: Sequence[Tensor], how: Rounding
) -> float:
    """:func:`noise_loss` of a unit that is stored in factors: the sum over its matrices.

    An error of the projection goes through the second factor, whose columns say what it counts at the outputs.

    Args:
        unit: the layers.
        stored: the layout, and the factors of the unit's weight.
        moments: of the unit.
        scales: ``E[h_o²]`` of each layer's outputs.
        how: the rounding.
    """
    layout, factors = stored
    encoded = layout.encode(unit, factors, torch.zeros_like(factors.offset), moments.input)
    rank = factors.down.shape[0]
    modules = [one.double().requires_grad_(requires_grad=False) for one in layout.build(unit, rank, encoded.facts)]
    for module, state in zip(modules, encoded.states, strict=True):
        module.load_state_dict({key: value.contiguous() for key, value in state.items()})
    felt: list[tuple[Tensor, Tensor]] = [
        module.felt(scale.double())  # type: ignore[operator]
        for module, scale in zip(modules, scales, strict=True)
    ]
    at_projection = torch.stack([projection for projection, _ in felt]).sum(0)
    total = 0.0
    for module, (_, at_up) in zip(modules, felt, strict=True):
        for path, matrix, _ in linear_maps(module):
            covariance = moments.input.matrix.double()
            reads = covariance if matrix is None else matrix.detach() @ covariance @ matrix.detach().mT
            spread = variances(reads, how.damping, where=f"`{unit.name}`: the inputs'", tokens=moments.tokens)
            counts = at_up if path == "up" else at_projection
            weight: Tensor = module.get_submodule(path).weight.detach()  # type: ignore[operator]
            total += noise_loss(weight, spread, counts, how.group, moments.share)
    return total


def noise_key(unit: str, layout: str) -> str:
    """Name of the forecast of rounding a unit in a layout to one step: by rank, or one number for the dense layers."""
    return f"{unit}/rounded/{layout}"


_GAINS = {1: 0.5, 2: 0.64, 3: 0.84, 4: 0.91}
"""What narrower grids and refitted scales leave of the loss that whole ranges would have: the geometric mean over the 210 layers
of a model of 135M parameters, from which single layers differ by 5 to 15 %."""


def rounding_share(bits: int) -> float:
    """What rounding to so many bits is forecast to lose, as a share of the noise of one step; 0 for unrounded weights."""
    return _GAINS.get(bits, 1.0) / (2**bits - 1) ** 2 if bits else 0.0
