"""½J at every rank: what compressing a unit is predicted to cost, in nats per token, for any method."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from fasc.statistics.moments import Statistics, UnitStatistics, as_float64
from fasc.planning.options import MethodConfig
from fasc.linalg.decomposition import Decomposition
from fasc.methods import Unit, decompose_unit, get_method, stacked_weight, unit_energies
from fasc.progress import progress

_SINGULAR = 1e-9
"""Relative size of a diagonal entry of R below which a weight is taken for rank-deficient."""


class RankedUnit(Unit, Protocol):
    """A unit at a rank."""

    @property
    def rank(self) -> int:
        """Directions kept."""


def loss_curves(
    model: PreTrainedModel,
    statistics: Statistics,
    options: MethodConfig,
    units: Sequence[Unit],
    *,
    held_out: Statistics | None = None,
) -> dict[str, NDArray[np.float64]]:
    """½J of each unit at each rank, from 0 to its number of directions.

    Args:
        model: the dense model that the statistics were measured on.
        statistics: with what the method needs, and the units' gradient moments.
        options: the method.
        units: whole groups or single layers.
        held_out: moments of other text to forecast by; takes whole decompositions.

    Raises:
        StatisticsError: a moment is missing.
    """
    curves = {}
    with progress(f"forecasting the loss of {options.name}", len(units), "units") as advance, torch.no_grad():
        for unit in units:
            quick = held_out is None and get_method(options.name).is_loss
            energies = unit_energies(model, statistics, unit, options) if quick else None
            if held_out is not None:
                curve = loss_on(model, held_out, unit, decompose_unit(model, statistics, unit, options))
            elif energies is not None:
                curve = half_tails(energies)
            else:
                curve = loss_curve(model, statistics, unit, options.name, decompose_unit(model, statistics, unit, options))
            curves[unit.unit] = curve.numpy(force=True)
            advance()
    return curves


def loss_curve(
    model: PreTrainedModel, statistics: Statistics, unit: Unit, method: str, decomposition: Decomposition
) -> Float[Tensor, " r1"]:
    """½J at each rank of a unit that any method has decomposed."""
    if get_method(method).is_loss:
        return half_energies(decomposition)
    return loss_on(model, statistics, unit, decomposition)


def loss_on(model: PreTrainedModel, moments: Statistics, unit: Unit, decomposition: Decomposition) -> Float[Tensor, " r1"]:
    """½J at each rank of a decomposition by moments that did not choose it, such as those of held-out text.

    Raises:
        StatisticsError: those moments lack the unit.
    """
    return fisher_loss_curve(decomposition, stacked_weight(model, moments, unit), moments.groups[unit.group].unit(unit.unit))


def predicted_losses(
    model: PreTrainedModel, statistics: Statistics, unit: RankedUnit, found: Mapping[str, Decomposition]
) -> dict[str, float]:
    """½J of a unit at its rank, by method."""
    return {name: float(loss_curve(model, statistics, unit, name, full)[unit.rank]) for name, full in found.items()}


def half_energies(decomposition: Decomposition) -> Float[Tensor, " r1"]:
    """½ Σ of the energies dropped at each rank from 0 to full: ½J where energies are in nats²."""
    return half_tails(decomposition.energies)


def half_tails(energies: Float[Tensor, " r"]) -> Float[Tensor, " r1"]:
    """½ Σ of the energies from each position on, and 0 after the last."""
    tails = energies.flip(0).cumsum(0).flip(0)
    return 0.5 * torch.cat([tails, tails.new_zeros(1)])


def fisher_loss_curve(
    decomposition: Decomposition, weight: Float[Tensor, "o i"], statistics: UnitStatistics
) -> Float[Tensor, " r1"]:
    """½ tr((W−W')ᵀ Σ_hh (W−W') Σ_xx) at each rank, of a decomposition that minimises something else.

    The error of rank k is ``Σ_{j≥k} up_j down_jᵀ``, so its loss is the sum of the lower right block, from k on, of
    ``(upᵀ Σ_hh up) ∘ (down Σ_xx downᵀ)``: one matrix holds every rank.

    Args:
        decomposition: of any method.
        weight: what it decomposes; brings gradient moments of the input side to the outputs (``up = W B``).
        statistics: of the unit.

    Raises:
        StatisticsError: the unit has no gradient moment.
    """
    gradient = statistics.require_gradient()
    _, covariance_x = as_float64(statistics.input, weight.device)
    _, covariance_g = as_float64(gradient.covariance, weight.device)
    up = decomposition.up if gradient.side == "output" else _at_input(weight, decomposition.up)
    both = (up.mT @ covariance_g @ up) * (decomposition.down @ covariance_x @ decomposition.down.mT)
    blocks = both.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal()
    return 0.5 * torch.cat([blocks.clamp_min(0), blocks.new_zeros(1)])


def _at_input(weight: Float[Tensor, "o i"], up: Float[Tensor, "o r"]) -> Float[Tensor, "i r"]:
    """``B`` of ``up = W B``, by QR: a tenth of the time of a pseudo-inverse, which is taken only where W is rank-deficient."""
    q, r = torch.linalg.qr(weight)
    size = r.diagonal().abs()
    if r.shape[0] == r.shape[1] and float(size.min()) > _SINGULAR * float(size.max()):
        found: Tensor = torch.linalg.solve_triangular(r, q.mT @ up, upper=True)
        return found
    shortest: Tensor = torch.linalg.pinv(weight) @ up
    return shortest
