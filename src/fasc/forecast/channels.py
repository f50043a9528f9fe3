"""Fewer channels per MLP: what that costs, and the narrower model and statistics that everything else then works on.

Removing channels is a projector on coordinates. Nothing but the MLP's own layers reads them, so the layers that make them lose
rows for nothing, and the reader is refitted to the channels that stay. The narrower layers can be factored like any others.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.planning.candidates import step_of
from fasc.planning.plan import ChannelCut
from fasc.statistics.moments import GradientMoment, GroupStatistics, Statistics, as_float64
from fasc.planning.options import MethodConfig
from fasc.forecast.half_j import fisher_loss_curve, half_tails
from fasc.errors import NonFiniteError, StatisticsError
from fasc.linalg.elimination import eliminate, refit
from fasc.statistics.accumulators import Covariance
from fasc.linalg.psd import cholesky, damped
from fasc.methods import get_method, stacked_weight, unit_in
from fasc.model.coupling import Channels, rows_of
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer, weight_of
from fasc.serving.quantizer import build_structure
from fasc.progress import progress

_STEPS = 24
"""Numbers of channels that a plan may choose from, at most."""

_FEWEST = 0.25
"""Least share of its channels that an MLP keeps."""


def counts_of(channels: int, rank_multiple: int, channel_multiple: int | None = None) -> list[int]:
    """Numbers of channels that a plan may keep, the largest first; not all of them.

    Args:
        channels: of the MLP.
        rank_multiple: what they are multiples of, where the MLP is large enough.
        channel_multiple: what they are multiples of in any case.
    """
    step = step_of(rank_multiple, channels) if channel_multiple is None else channel_multiple
    step *= -(-channels // (_STEPS * step))
    return [count for count in range((channels - 1) // step * step, 0, -step) if count >= _FEWEST * channels]


def cut_key(reader: str) -> str:
    """Where the forecast of a cut alone lies: ½J by the number of channels removed."""
    return f"{reader}/removed"


def curve_key(reader: str, kept: int) -> str:
    """Where the forecast of the reader with so many channels lies: ½J at each rank, without the cut's own."""
    return f"{reader}/{kept}"


def narrowed_group(group: InputGroup, channels: Channels, kept: int) -> InputGroup:
    """A group of an MLP's layers with so many channels left; the reader gains a bias for the mean of the others."""
    if group.name == channels.reader.name:
        return InputGroup(tuple(replace(layer, d_in=kept, bias=True) for layer in group.layers))

    def narrow(layer: Layer) -> Layer:
        return replace(layer, d_out=layer.d_out // channels.count * kept) if layer in channels.makers else layer

    return InputGroup(tuple(map(narrow, group.layers)))


def removed_parameters(channels: Channels, kept: int) -> int:
    """How many parameters fewer the MLP's layers have with so many channels, biases included."""
    groups = (channels.group, channels.reader)
    narrow = [narrowed_group(group, channels, kept) for group in groups]
    return sum(layer.parameters for group in groups for layer in group.layers) - sum(
        layer.parameters for group in narrow for layer in group.layers
    )


def channel_curves(
    model: PreTrainedModel,
    found: Sequence[Channels],
    options: MethodConfig,
    possible: Callable[[int], Sequence[int]],
    moments: tuple[Statistics, Statistics | None],
) -> dict[str, NDArray[np.float64]]:
    """Forecasts of every number of channels: see :func:`cut_key` and :func:`curve_key`.

    Args:
        model: dense.
        found: its MLPs.
        options: for the damping, and the method that decomposes what is left.
        possible: the numbers of channels to forecast, by how many there are (:func:`counts_of`).
        moments: that choose; and those of held-out text by which the loss is forecast, if any.

    Raises:
        StatisticsError: the statistics lack a gradient moment of a reader.
    """
    curves: dict[str, NDArray[np.float64]] = {}
    with progress("forecasting the loss of fewer channels", len(found), "MLPs") as advance, torch.no_grad():
        for one in found:
            counts = possible(one.count)
            if moments[1] is None:
                curves |= _curves(model, moments[0], one, options, counts)
            else:
                curves |= _held_out_curves(model, (moments[0], moments[1]), one, options, counts)
            advance()
    return curves


def _problem(model: PreTrainedModel, statistics: Statistics, channels: Channels, damping: float) -> tuple[Tensor, Tensor]:
    """The reader's weight in an orthonormal basis of the metric, and the damped Σ_xx; float64."""
    group = _reader(statistics, channels)
    gradient = group.unit(group.group.name).require_gradient()
    weight = stacked_weight(model, statistics, unit_in(group.group, group.group.layers))
    _, metric = as_float64(gradient.covariance, weight.device)
    _, covariance = as_float64(group.input, weight.device)
    root = cholesky(damped(metric, damping), where=f"`{group.group.name}`: the gradients'", tokens=group.tokens)
    return root.mT @ weight if gradient.side == "output" else root.mT, damped(covariance, damping)


def _reader(statistics: Statistics, channels: Channels) -> GroupStatistics:
    if channels.reader.name not in statistics.groups:
        raise StatisticsError(f"the statistics have no group `{channels.reader.name}`", "run `fasc collect` with the same layers")
    return statistics.groups[channels.reader.name]


def _curves(
    model: PreTrainedModel, statistics: Statistics, channels: Channels, options: MethodConfig, counts: Sequence[int]
) -> dict[str, NDArray[np.float64]]:
    """The covariance of the outputs, whitened by the metric, less what each removal takes from it, has every curve in it."""
    weight, covariance = _problem(model, statistics, channels, options.damping)
    name, size = channels.reader.name, channels.count
    found = eliminate(weight, covariance, min(counts))
    curves = {cut_key(name): (0.5 * found.losses()).numpy(force=True)}
    outputs = weight @ covariance @ weight.mT
    rank = min(channels.reader.d_out, size)
    done = 0
    for kept in counts:
        taken = found.residuals[done : size - kept]
        outputs = outputs - taken.mT @ taken
        done = size - kept
        energies = torch.linalg.eigvalsh(outputs).flip(-1).clamp_min(0)[:rank]
        curves[curve_key(name, kept)] = half_tails(energies).numpy(force=True)
    return curves


def _held_out_curves(
    model: PreTrainedModel,
    moments: tuple[Statistics, Statistics],
    channels: Channels,
    options: MethodConfig,
    counts: Sequence[int],
) -> dict[str, NDArray[np.float64]]:
    """The same by moments that did not choose: the loss of each cut and of each decomposition of what is left."""
    statistics, unseen = moments
    weight, covariance = _problem(model, statistics, channels, options.damping)
    name, size = channels.reader.name, channels.count
    found = eliminate(weight, covariance, min(counts))
    plain = stacked_weight(model, statistics, unit_in(channels.reader, channels.reader.layers))
    losses = np.zeros(size - min(counts) + 1)
    curves = {}
    for kept in counts:
        one = Cutting(channels, found.kept(kept, size), refit(covariance, found.kept(kept, size)))
        losses[size - kept] = cut_loss(model, unseen, one)
        sides = [narrowed(part, [one]).groups[name].unit(name) for part in moments]
        narrow = plain @ one.estimate
        full = get_method(options.name).decompose(narrow, sides[0], options)
        curves[curve_key(name, kept)] = fisher_loss_curve(full, narrow, sides[1]).numpy(force=True)
    return curves | {cut_key(name): losses}


@dataclass(frozen=True, slots=True)
class Cutting:
    """Which channels of an MLP stay, and what the others are taken for."""

    channels: Channels
    kept: Tensor
    """Ascending indices."""

    estimate: Tensor
    """``T``, [channels, kept], float64: the best linear estimate of all channels from those that stay."""


def cut_loss(model: PreTrainedModel, moments: Statistics, cutting: Cutting) -> float:
    """½J of a cut by moments that did not choose it; nats per token."""
    group = _reader(moments, cutting.channels)
    gradient = group.unit(group.group.name).require_gradient()
    weight = stacked_weight(model, moments, unit_in(group.group, group.group.layers))
    _, metric = as_float64(gradient.covariance, weight.device)
    _, covariance = as_float64(group.input, weight.device)
    estimate = cutting.estimate.to(weight)
    error = torch.eye(len(estimate)).to(weight)
    error[:, cutting.kept.to(weight.device)] -= estimate
    if gradient.side == "output":
        error = weight @ error
    return 0.5 * float(((error.mT @ metric @ error) * covariance).sum())


def cutting_of(model: PreTrainedModel, statistics: Statistics, cut: ChannelCut, damping: float) -> Cutting:
    """Choose the channels that stay, as a plan's forecast did.

    Args:
        model: dense.
        statistics: measured on it.
        cut: of the plan.
        damping: relative, of both covariances.

    Raises:
        StatisticsError: a group is missing.
    """
    groups = {layer.name: group.group for group in statistics.groups.values() for layer in group.group.layers}
    absent = [name for name in cut.layers if name not in groups]
    if absent:
        raise StatisticsError(f"the statistics have no layer `{absent[0]}`", "run `fasc collect` with the same layers")
    group = groups[cut.makers[0]]
    makers = tuple(layer for layer in group.layers if layer.name in cut.makers)
    channels = Channels(group, makers, groups[cut.reader])
    weight, covariance = _problem(model, statistics, channels, damping)
    kept = eliminate(weight, covariance, cut.kept).kept(cut.kept, cut.channels)
    return Cutting(channels, kept, refit(covariance, kept))


def cuttings_of(model: PreTrainedModel, statistics: Statistics, cuts: Sequence[ChannelCut], damping: float) -> Iterator[Cutting]:
    """:func:`cutting_of` for every cut of a plan, each when it is asked for."""
    if not cuts:
        return
    with progress("choosing channels", len(cuts), "MLPs") as advance:
        for cut in cuts:
            with torch.no_grad():
                found = cutting_of(model, statistics, cut, damping)
            yield found
            del found  # its estimate is as large as the reader, in float64
            advance()


def narrowed(statistics: Statistics, cuttings: Sequence[Cutting]) -> Statistics:
    """The statistics of the model without the channels that are removed.

    Inputs and gradients at other places stay as they were measured. A channel that stays is read in place of those that go, so
    gradients of the makers' outputs become ``Tᵀ h``; what arrives at the makers' inputs is nearly what it was.
    """
    groups: dict[str, GroupStatistics] = dict(statistics.groups)
    for one in cuttings:
        makers, reader = (groups[group.name] for group in (one.channels.group, one.channels.reader))
        groups[makers.group.name] = _narrowed_makers(makers, one)
        groups[reader.group.name] = _narrowed_reader(reader, one)
    return replace(statistics, groups=groups)


def _narrowed_makers(makers: GroupStatistics, cutting: Cutting) -> GroupStatistics:
    channels, estimate = cutting.channels, cutting.estimate.cpu()
    gradients: dict[str, GradientMoment] = {}
    for name, gradient in makers.gradients.items():
        if gradient.side == "input":
            gradients[name] = gradient
            continue
        parts: list[Tensor] = []
        for layer in _layers_of(makers.group, name):
            made = layer in channels.makers
            parts += [estimate] * (layer.d_out // channels.count) if made else [torch.eye(layer.d_out, dtype=estimate.dtype)]
        mean, covariance = as_float64(gradient.covariance)
        change = torch.block_diag(*parts)
        cross = None if gradient.cross is None else gradient.cross @ change.to(gradient.cross)
        gradients[name] = GradientMoment("output", _mapped(mean, covariance, change), cross)
    group = narrowed_group(makers.group, channels, len(cutting.kept))
    return replace(makers, group=group, gradients=gradients, extras={})


def _layers_of(group: InputGroup, unit: str) -> tuple[Layer, ...]:
    return tuple(layer for layer in group.layers if layer.name == unit) or group.layers


def _narrowed_reader(reader: GroupStatistics, cutting: Cutting) -> GroupStatistics:
    kept = cutting.kept
    gradients: dict[str, GradientMoment] = {}
    for name, gradient in reader.gradients.items():
        cross = None if gradient.cross is None else gradient.cross[kept]
        if gradient.side == "input":
            mean, covariance = as_float64(gradient.covariance)
            estimate = cutting.estimate.cpu()
            cross = None if cross is None else cross @ estimate.to(cross)
            gradients[name] = GradientMoment("input", _mapped(mean, covariance, estimate), cross)
        else:
            gradients[name] = GradientMoment("output", gradient.covariance, cross)
    inputs = Covariance(reader.input.mean[kept], reader.input.matrix[kept][:, kept])
    group = narrowed_group(reader.group, cutting.channels, len(kept))
    return replace(reader, group=group, input=inputs, gradients=gradients, extras={})


def _mapped(mean: Tensor, covariance: Tensor, estimate: Tensor) -> Covariance:
    """Moments of ``Tᵀ h``."""
    return Covariance((estimate.mT @ mean).float(), (estimate.mT @ covariance @ estimate).float())


def cut_channels(model: PreTrainedModel, statistics: Statistics, cutting: Cutting) -> dict[str, object]:
    """Replace the layers of an MLP by narrower ones, in place.

    Args:
        model: changed in place.
        statistics: of the dense model, for the mean of the channels that go.
        cutting: what stays.

    Returns:
        The entry in the checkpoint's structure.

    Raises:
        NonFiniteError: the refitted weight holds NaN or infinity.
    """
    channels, kept = cutting.channels, cutting.kept
    weights = {layer.name: weight_of(model, layer).detach() for layer in channels.layers}
    biases = {name: getattr(model.get_submodule(name), "bias", None) for name in weights}
    reader = channels.reader.layers[0]
    weight = weights[reader.name].double()
    estimate = cutting.estimate.to(weight)
    mean, _ = as_float64(statistics.groups[channels.reader.name].input, weight.device)
    refitted = weight @ estimate
    offset = weight @ (mean - estimate @ mean[kept])
    if not bool(torch.isfinite(refitted.sum() + offset.sum())):
        raise NonFiniteError(f"`{reader.name}`: the weight refitted to {len(kept)} channels", "raise --damping")
    entry: dict[str, object] = {"layers": list(weights), "rank": None, "channels": [channels.count, len(kept)]}
    build_structure(model, [dict(entry)])
    for layer in channels.makers:
        rows = rows_of(kept.to(weight.device), channels.count, layer.d_out)
        _fill(model.get_submodule(layer.name), weights[layer.name][rows], biases[layer.name], rows)
    own = biases[reader.name]
    _fill(model.get_submodule(reader.name), refitted, offset if own is None else offset + own.detach())
    return entry


def cut_all(
    model: PreTrainedModel, statistics: Statistics, cuttings: Iterable[Cutting]
) -> tuple[Statistics, dict[str, Tensor], list[dict[str, object]]]:
    """Cut one MLP after the other, in place, so that the estimates of only one are in memory where ``cuttings`` makes them.

    Returns:
        The statistics of the narrower model, which channels each reader keeps, and the structure's entries.
    """
    kept: dict[str, Tensor] = {}
    structure: list[dict[str, object]] = []
    for one in cuttings:
        structure.append(cut_channels(model, statistics, one))
        statistics = narrowed(statistics, [one])
        kept[one.channels.reader.name] = one.kept
        del one
    return statistics, kept, structure


def _fill(module: nn.Module, weight: Tensor, bias: Tensor | None, rows: Tensor | None = None) -> None:
    parameters: Mapping[str, Tensor] = dict(module.named_parameters())
    with torch.no_grad():
        parameters["weight"].copy_(weight)
        if bias is not None:
            parameters["bias"].copy_(bias if rows is None else bias.detach()[rows])
