"""The statistics of a model whose MLPs have lost channels: what is left of the moments."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fasc.model.coupling import Coupling
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GradientMoment, GroupStatistics, Statistics, as_float64


@dataclass(frozen=True, slots=True)
class Narrowing:
    """Which channels of an MLP stay, and what the others are taken for."""

    coupling: Coupling
    channels: Tensor
    """Those that stay, ascending indices."""

    estimate: Tensor
    """``T``, [all channels, channels that stay], float64: the best linear estimate of all from those that stay."""

    @property
    def width(self) -> int:
        """How many channels stay."""
        return len(self.channels)


def narrowed_group(group: InputGroup, coupling: Coupling, width: int) -> InputGroup:
    """A group of an MLP's layers with so many channels left; the consumer gains a bias for the mean of the others."""
    if group.name == coupling.consumer.name:
        return InputGroup(tuple(replace(layer, d_in=width, bias=True) for layer in group.layers))

    def narrow(layer: Layer) -> Layer:
        return replace(layer, d_out=layer.d_out // coupling.parts * width) if layer in coupling.producers else layer

    return InputGroup(tuple(map(narrow, group.layers)))


def narrowed(statistics: Statistics, narrowing: Narrowing) -> Statistics:
    """The statistics of the model without the channels that are removed.

    Inputs and gradients at other places are assumed unchanged. The consumer reads ``T x`` in the place of ``x``, so gradients
    of the producers' outputs become ``Tᵀ h``.
    """
    groups: dict[str, GroupStatistics] = dict(statistics.groups)
    for group, narrow in ((narrowing.coupling.group, _narrowed_producers), (narrowing.coupling.consumer, _narrowed_consumer)):
        groups[group.name] = narrow(groups[group.name], narrowing)
    return replace(statistics, groups=groups)


def _narrowed_producers(producers: GroupStatistics, narrowing: Narrowing) -> GroupStatistics:
    coupling, estimate = narrowing.coupling, narrowing.estimate.cpu()
    gradients: dict[str, GradientMoment] = {}
    for name, gradient in producers.gradients.items():
        if gradient.side == "input":
            gradients[name] = gradient
            continue
        parts: list[Tensor] = []
        for layer in tuple(one for one in producers.group.layers if one.name == name) or producers.group.layers:
            narrows = layer in coupling.producers
            repeats = layer.d_out // coupling.parts
            parts += [estimate] * repeats if narrows else [torch.eye(layer.d_out, dtype=estimate.dtype)]
        mean, covariance = as_float64(gradient.covariance)
        change = torch.block_diag(*parts)
        cross = None if gradient.cross is None else gradient.cross @ change.to(gradient.cross)
        gradients[name] = GradientMoment("output", _mapped(mean, covariance, change), cross)
    group = narrowed_group(producers.group, coupling, narrowing.width)
    return replace(producers, group=group, gradients=gradients, extras={})


def _narrowed_consumer(consumer: GroupStatistics, narrowing: Narrowing) -> GroupStatistics:
    channels = narrowing.channels
    gradients: dict[str, GradientMoment] = {}
    for name, gradient in consumer.gradients.items():
        cross = None if gradient.cross is None else gradient.cross[channels]
        if gradient.side == "input":
            mean, covariance = as_float64(gradient.covariance)
            estimate = narrowing.estimate.cpu()
            cross = None if cross is None else cross @ estimate.to(cross)
            gradients[name] = GradientMoment("input", _mapped(mean, covariance, estimate), cross)
        else:
            gradients[name] = GradientMoment("output", gradient.covariance, cross)
    inputs = Covariance(consumer.input.mean[channels], consumer.input.matrix[channels][:, channels])
    group = narrowed_group(consumer.group, narrowing.coupling, narrowing.width)
    return replace(consumer, group=group, input=inputs, gradients=gradients, extras={})


def _mapped(mean: Tensor, covariance: Tensor, estimate: Tensor) -> Covariance:
    """Moments of ``Tᵀ h``."""
    return Covariance((estimate.mT @ mean).float(), (estimate.mT @ covariance @ estimate).float())
