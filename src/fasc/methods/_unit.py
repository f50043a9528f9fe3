"""One unit of a model through one method."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fasc.statistics.moments import Statistics
from fasc.planning.options import MethodConfig
from fasc.errors import StatisticsError
from fasc.linalg.decomposition import Decomposition
from fasc.methods._registry import get_method
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer, weight_of


@runtime_checkable
class Unit(Protocol):
    """Layers of one group that share a decomposition."""

    @property
    def unit(self) -> str:
        """The group's name, or the layer's."""

    @property
    def group(self) -> str:
        """The group they belong to."""

    @property
    def layers(self) -> tuple[str, ...]:
        """Qualified names."""


@dataclass(frozen=True, slots=True)
class LayerUnit:
    """A unit that has no plan yet."""

    unit: str
    group: str
    layers: tuple[str, ...]


def unit_in(group: InputGroup, layers: Sequence[Layer]) -> LayerUnit:
    """Some layers of a group as a unit."""
    names = tuple(layer.name for layer in layers)
    return LayerUnit(names[0] if len(names) == 1 else group.name, group.name, names)


def decompose_unit(model: PreTrainedModel, statistics: Statistics, unit: Unit, options: MethodConfig) -> Decomposition:
    """The full decomposition of one unit, float64.

    Raises:
        StatisticsError: the statistics have no such group.
    """
    weight = stacked_weight(model, statistics, unit)
    return get_method(options.name).decompose(weight, statistics.groups[unit.group].unit(unit.unit), options)


def unit_energies(model: PreTrainedModel, statistics: Statistics, unit: Unit, options: MethodConfig) -> Tensor | None:
    """The energies of :func:`decompose_unit` alone, if the method can have them without the directions."""
    method = get_method(options.name)
    if method.energies is None:
        return None
    weight = stacked_weight(model, statistics, unit)
    return method.energies(weight, statistics.groups[unit.group].unit(unit.unit), options)


def stacked_weight(model: PreTrainedModel, statistics: Statistics, unit: Unit) -> Tensor:
    """The weights of the unit's layers one below the other, [Σ d_out, d_in], float64.

    Raises:
        StatisticsError: the statistics have no such group.
    """
    if unit.group not in statistics.groups:
        raise StatisticsError(f"the statistics have no group `{unit.group}`", "run `fasc collect` with the same layers")
    known: dict[str, Layer] = {layer.name: layer for layer in statistics.groups[unit.group].group.layers}
    rows = [weight_of(model, known[name]).detach() for name in unit.layers]
    device = rows[0].device if rows[0].device.type == "cuda" else torch.device("cpu")
    return torch.cat([row.to(device, torch.float64) for row in rows])
