"""The statistics of a model one of whose attentions has lost heads or value features."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fasc.model.coupling import Coupling
from fasc.model.groups import InputGroup
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GradientMoment, GroupStatistics, Statistics, as_float64


class Outputs(NamedTuple):
    """What becomes of a producer's outputs."""

    rows: Tensor
    """``A``, [new, old]: the new outputs are ``A y``."""

    estimate: Tensor
    """``B``, [old, new]: the old ones are taken for ``B A y``, so that gradients become ``Bᵀ h``."""


@dataclass(frozen=True, slots=True)
class Reduction:
    """Which linear functions of a consumer's inputs stay, and what the inputs are taken for; float64."""

    coupling: Coupling
    reads: Tensor
    """``A``, [kept, d_in]: the consumer reads ``A x``."""

    estimate: Tensor
    """``T``, [d_in, kept]: and takes ``x`` for ``T A x``."""

    producers: Mapping[str, Outputs]
    """By layer; others stay as they are."""


def reduced(statistics: Statistics, reduction: Reduction) -> Statistics:
    """The statistics of the model after a reduction; inputs and gradients at other places are assumed unchanged."""
    coupling = reduction.coupling
    groups: dict[str, GroupStatistics] = dict(statistics.groups)
    groups[coupling.group.name] = _producers(groups[coupling.group.name], reduction)
    groups[coupling.consumer.name] = _consumer(groups[coupling.consumer.name], reduction)
    return replace(statistics, groups=groups)


def _producers(group: GroupStatistics, reduction: Reduction) -> GroupStatistics:
    known = reduction.producers
    layers = tuple(
        replace(layer, d_out=len(known[layer.name].rows)) if layer.name in known else layer for layer in group.group.layers
    )
    gradients: dict[str, GradientMoment] = {}
    for name, gradient in group.gradients.items():
        if gradient.side == "input":
            gradients[name] = gradient
            continue
        members = tuple(one for one in group.group.layers if one.name == name) or group.group.layers
        parts = [
            known[one.name].estimate.cpu() if one.name in known else torch.eye(one.d_out, dtype=torch.float64) for one in members
        ]
        change = torch.block_diag(*parts)
        cross = None if gradient.cross is None else gradient.cross @ change.to(gradient.cross)
        gradients[name] = GradientMoment("output", mapped(gradient.covariance, change.mT), cross)
    return replace(group, group=InputGroup(layers), gradients=gradients, extras={})


def _consumer(group: GroupStatistics, reduction: Reduction) -> GroupStatistics:
    reads, estimate = reduction.reads.cpu(), reduction.estimate.cpu()
    gradients: dict[str, GradientMoment] = {}
    for name, gradient in group.gradients.items():
        cross = None if gradient.cross is None else reads.to(gradient.cross) @ gradient.cross
        if gradient.side == "input":
            cross = None if cross is None else cross @ estimate.to(cross)
            gradients[name] = GradientMoment("input", mapped(gradient.covariance, estimate.mT), cross)
        else:
            gradients[name] = GradientMoment("output", gradient.covariance, cross)
    layers = tuple(replace(layer, d_in=len(reads), bias=True) for layer in group.group.layers)
    return replace(group, group=InputGroup(layers), input=mapped(group.input, reads), gradients=gradients, extras={})


def mapped(covariance: Covariance, change: Tensor) -> Covariance:
    """Moments of ``A x``."""
    mean, matrix = as_float64(covariance)
    return Covariance((change @ mean).float(), (change @ matrix @ change.mT).float())
