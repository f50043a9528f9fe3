"""½J at every rank: what factoring a unit is predicted to cost, for any method.

½J is a forecast of the KL divergence to the dense model in nats per token of text. Moments of an expert are means over the tokens
that were routed to it, so its loss counts by its share π of the tokens: the forecast of a model is ``Σ π ½J`` (docs/method.md).
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from fasc.linalg.decomposition import Decomposition, conjugated
from fasc.methods import Solver
from fasc.model.groups import Unit, stacked_weight
from fasc.processes import current
from fasc.statistics.moments import Statistics, UnitStatistics, as_float64

_SINGULAR = 1e-9
"""Relative size of a diagonal entry of R below which a weight is taken for rank-deficient."""


def loss_curves(
    model: PreTrainedModel,
    statistics: Statistics,
    solver: Solver,
    units: Sequence[Unit],
    *,
    held_out: Statistics | None = None,
) -> dict[str, NDArray[np.float64]]:
    """½J of each unit at each rank, from 0 to its number of directions, in nats per token of text.

    Args:
        model: the dense model that the statistics were measured on.
        statistics: with what the method needs, and the units' gradient moments.
        solver: the method.
        units: whole groups or single layers.
        held_out: moments of other text to forecast by; takes whole decompositions.

    Raises:
        StatisticsError: a moment is missing.
    """

    def curve_of(number: int) -> dict[str, Tensor]:
        unit = units[number]
        weight, moments = stacked_weight(model, unit), statistics.unit(unit)
        quick = held_out is None and solver.method.is_loss
        energies = solver.energies(weight, moments) if quick else None
        if energies is not None:
            curve = half_tails(energies) * moments.share
        elif held_out is not None:
            curve = fisher_loss_curve(solver.decompose(weight, moments), weight, held_out.unit(unit))
        else:
            curve = loss_curve(solver, solver.decompose(weight, moments), weight, moments)
        return {unit.name: curve}

    costs = [float(unit.full_rank) ** 3 for unit in units]
    with torch.no_grad():
        found = current().each((f"forecasting the loss of {solver.name}", "units"), costs, curve_of)
    return {name: curve.numpy() for name, curve in found.items()}


def loss_curve(
    solver: Solver, decomposition: Decomposition, weight: Float[Tensor, "o i"], moments: UnitStatistics
) -> Float[Tensor, " r1"]:
    """½J at each rank of a unit that this method has decomposed by these moments."""
    if solver.method.is_loss:
        return half_tails(decomposition.energies) * moments.share
    return fisher_loss_curve(decomposition, weight, moments)


def half_tails(energies: Float[Tensor, " r"]) -> Float[Tensor, " r1"]:
    """½ Σ of the energies from each position on, and 0 after the last: ½J at each rank where energies are in nats²."""
    tails = energies.flip(0).cumsum(0).flip(0)
    return 0.5 * torch.cat([tails, tails.new_zeros(1)])


def fisher_loss_curve(
    decomposition: Decomposition, weight: Float[Tensor, "o i"], moments: UnitStatistics
) -> Float[Tensor, " r1"]:
    """π · ½ tr((W−W')ᵀ Σ_hh (W−W') Σ_xx) at each rank, by moments that need not be those that chose the decomposition.

    The error of rank k is ``Σ_{j≥k} up_j down_jᵀ``, so its loss is the sum of the lower right block, from k on, of
    ``(upᵀ Σ_hh up) ∘ (down Σ_xx downᵀ)``: one matrix holds every rank.

    Args:
        decomposition: of any method.
        weight: what it decomposes; brings gradient moments of the input side to the outputs (``up = W B``).
        moments: of the unit, such as those of held-out text.

    Raises:
        StatisticsError: the unit has no gradient moment.
    """
    gradient = moments.require_gradient()
    covariance_x = moments.input.matrix.to(weight.device)
    _, covariance_g = as_float64(gradient.covariance, weight.device)
    up = decomposition.up if gradient.side == "output" else _at_input(weight, decomposition.up)
    both = (up.mT @ covariance_g @ up) * conjugated(decomposition.down, covariance_x)
    blocks = both.flip(0, 1).cumsum(0).cumsum(1).flip(0, 1).diagonal()
    return 0.5 * moments.share * torch.cat([blocks.clamp_min(0), blocks.new_zeros(1)])


def _at_input(weight: Float[Tensor, "o i"], up: Float[Tensor, "o r"]) -> Float[Tensor, "i r"]:
    """``B`` of ``up = W B``, by QR: a tenth of the time of a pseudo-inverse, which is taken only where W is rank-deficient."""
    q, r = torch.linalg.qr(weight)
    size = r.diagonal().abs()
    if r.shape[0] == r.shape[1] and float(size.min()) > _SINGULAR * float(size.max()):
        solved: Tensor = torch.linalg.solve_triangular(r, q.mT @ up, upper=True)
        return solved
    shortest: Tensor = torch.linalg.pinv(weight) @ up
    return shortest
