"""Channel pruning: which channels of an MLP go, and what each number of them costs.

Removing channels is a projector on coordinates. Nothing but the MLP's own layers reads them, so the producers lose rows for
nothing, and the consumer is refitted to the channels that stay. The narrower layers can be factored like any others.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from fasc.forecast.half_j import fisher_loss_curve, half_tails
from fasc.linalg.elimination import Elimination, eliminate, refit
from fasc.linalg.psd import cholesky, damped
from fasc.methods import Solver
from fasc.model.coupling import Coupling
from fasc.model.groups import stacked_weight
from fasc.processes import current
from fasc.statistics.moments import Statistics, as_float64
from fasc.statistics.narrowing import Narrowing, narrowed

Curve = NDArray[np.float64]


def narrowing_key(consumer: str) -> str:
    """Name of the forecast of channel pruning alone: ½J by the number of channels removed."""
    return f"{consumer}/removed"


def narrow_consumer_key(consumer: str, width: int) -> str:
    """Name of the forecast of the consumer with so many channels: ½J at each rank, beyond that of the pruning."""
    return f"{consumer}/{width}"


def channel_curves(
    model: PreTrainedModel,
    couplings: Sequence[Coupling],
    solver: Solver,
    widths: Callable[[int], Sequence[int]],
    moments: tuple[Statistics, Statistics | None],
) -> dict[str, Curve]:
    """Forecasts of every number of channels: see :func:`narrowing_key` and :func:`narrow_consumer_key`.

    Args:
        model: dense.
        couplings: its MLPs.
        solver: for the damping, and the method that decomposes what is left.
        widths: the numbers of channels to forecast, by how many there are.
        moments: that choose; and those of held-out text by which the loss is forecast, if any.

    Raises:
        StatisticsError: the statistics lack a gradient moment of a consumer.
    """

    def curves_of(number: int) -> dict[str, Tensor]:
        coupling = couplings[number]
        if moments[1] is None:
            curves = _curves(model, moments[0], coupling, solver, widths(coupling.parts))
        else:
            curves = _held_out_curves(model, (moments[0], moments[1]), coupling, solver, widths(coupling.parts))
        return {name: torch.from_numpy(curve) for name, curve in curves.items()}

    costs = [float(coupling.parts) ** 3 for coupling in couplings]
    with torch.no_grad():
        found = current().each(("forecasting the loss of fewer channels", "MLPs"), costs, curves_of)
    return {name: curve.numpy() for name, curve in found.items()}


def choose_channels(model: PreTrainedModel, statistics: Statistics, coupling: Coupling, width: int, damping: float) -> Narrowing:
    """The channels of an MLP that stay: others are removed one after the other, each time the one that costs least.

    Args:
        model: dense.
        statistics: measured on it.
        coupling: the MLP.
        width: channels that stay.
        damping: relative, of both covariances.

    Raises:
        StatisticsError: a group is missing.
    """
    with torch.no_grad():
        weight, covariance = _problem(model, statistics, coupling, damping)
        return _narrowing(coupling, covariance, eliminate(weight, covariance, width), width)


def narrowing_loss(model: PreTrainedModel, moments: Statistics, narrowing: Narrowing) -> float:
    """½J of channel pruning by moments that need not be those that chose the channels; nats per token."""
    coupling = narrowing.coupling
    unit = moments.unit(coupling.consumer.unit())
    gradient = unit.require_gradient()
    weight = stacked_weight(model, coupling.consumer.unit())
    _, metric = as_float64(gradient.covariance, weight.device)
    _, covariance = as_float64(unit.input, weight.device)
    estimate = narrowing.estimate.to(weight)
    error = torch.eye(len(estimate)).to(weight)
    error[:, narrowing.channels.to(weight.device)] -= estimate
    if gradient.side == "output":
        error = weight @ error
    return 0.5 * unit.share * float(((error.mT @ metric @ error) * covariance).sum())


def _narrowing(coupling: Coupling, covariance: Tensor, elimination: Elimination, width: int) -> Narrowing:
    channels = elimination.kept(width, coupling.parts)
    return Narrowing(coupling, channels, refit(covariance, channels))


def _problem(model: PreTrainedModel, statistics: Statistics, coupling: Coupling, damping: float) -> tuple[Tensor, Tensor]:
    """The consumer's weight in an orthonormal basis of the metric, and the damped Σ_xx; float64."""
    unit = statistics.unit(coupling.consumer.unit())
    gradient = unit.require_gradient()
    weight = stacked_weight(model, coupling.consumer.unit())
    _, metric = as_float64(gradient.covariance, weight.device)
    _, covariance = as_float64(unit.input, weight.device)
    root = cholesky(damped(metric, damping), where=f"`{unit.name}`: the gradients'", tokens=unit.tokens)
    return root.mT @ weight if gradient.side == "output" else root.mT, damped(covariance, damping)


def _curves(
    model: PreTrainedModel, statistics: Statistics, coupling: Coupling, solver: Solver, widths: Sequence[int]
) -> dict[str, Curve]:
    """The covariance of the outputs, whitened by the metric, less what each removal takes from it, has every curve in it."""
    weight, covariance = _problem(model, statistics, coupling, solver.damping)
    name, share = coupling.consumer.name, statistics.unit(coupling.consumer.unit()).share
    elimination = eliminate(weight, covariance, min(widths))
    curves = {narrowing_key(name): (0.5 * share * elimination.losses()).numpy(force=True)}
    outputs = weight @ covariance @ weight.mT
    rank = min(coupling.consumer.d_out, coupling.parts)
    done = 0
    for width in widths:
        taken = elimination.residuals[done : coupling.parts - width]
        outputs = outputs - taken.mT @ taken
        done = coupling.parts - width
        energies = torch.linalg.eigvalsh(outputs).flip(-1).clamp_min(0)[:rank]
        curves[narrow_consumer_key(name, width)] = (share * half_tails(energies)).numpy(force=True)
    return curves


def _held_out_curves(
    model: PreTrainedModel,
    moments: tuple[Statistics, Statistics],
    coupling: Coupling,
    solver: Solver,
    widths: Sequence[int],
) -> dict[str, Curve]:
    """The same by moments that did not choose: the loss of each pruning and of each decomposition of what is left."""
    weight, covariance = _problem(model, moments[0], coupling, solver.damping)
    name, size = coupling.consumer.name, coupling.parts
    elimination = eliminate(weight, covariance, min(widths))
    consumer = coupling.consumer.unit()
    plain = stacked_weight(model, consumer)
    losses = np.zeros(size - min(widths) + 1)
    curves = {}
    for width in widths:
        narrowing = _narrowing(coupling, covariance, elimination, width)
        losses[size - width] = narrowing_loss(model, moments[1], narrowing)
        chosen, unseen = (narrowed(part, narrowing).groups[name].unit(name) for part in moments)
        narrow = plain @ narrowing.estimate.to(plain)
        curve = fisher_loss_curve(solver.decompose(narrow, chosen), narrow, unseen)
        curves[narrow_consumer_key(name, width)] = curve.numpy(force=True)
    return curves | {narrowing_key(name): losses}
