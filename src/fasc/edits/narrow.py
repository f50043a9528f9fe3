"""Narrow: an MLP keeps fewer channels, and the layer that reads them is refitted to those that stay."""

from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.edits._registry import Edit, Layers, edit_kind, require_layers
from fasc.edits.structure import empty_modules, fill, put_module, record
from fasc.errors import ModelError, StatisticsError
from fasc.forecast.channels import choose_channels
from fasc.model.coupling import Coupling, rows_of
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer, weight_of
from fasc.statistics.moments import Statistics, as_float64
from fasc.statistics.narrowing import Narrowing, narrowed


class Shape(NamedTuple):
    """Of one dense layer."""

    name: str
    d_in: PositiveInt
    d_out: PositiveInt
    bias: bool

    @property
    def layer(self) -> Layer:
        """The layer."""
        return Layer(self.name, self.d_in, self.d_out, bias=self.bias)


@edit_kind("narrow")
class Narrow(Edit):
    """Channels of one MLP are removed: rows of its producers and columns of its consumer."""

    edit: Literal["narrow"] = "narrow"
    producers: tuple[Shape, ...]
    consumer: Shape
    channels: PositiveInt
    """How many there are."""

    width: PositiveInt
    """How many stay."""

    damping: NonNegativeFloat = 1e-4
    """Relative, of both covariances."""

    word: ClassVar[str] = "channels"
    """Allows it in ``--layouts``."""

    @staticmethod
    def of(coupling: Coupling, width: int, damping: float, loss: float | None = None) -> "Narrow":
        """The edit that leaves an MLP so many channels."""
        *producers, consumer = (Shape(layer.name, layer.d_in, layer.d_out, layer.bias) for layer in coupling.layers)
        return Narrow(
            producers=tuple(producers),
            consumer=consumer,
            channels=coupling.parts,
            width=width,
            damping=damping,
            predicted_loss=loss,
        )

    @property
    def touches(self) -> tuple[str, ...]:
        """Producers and consumer."""
        return (*(one.name for one in self.producers), self.consumer.name)

    @property
    def saved(self) -> int:
        """Rows and columns, less the bias that the consumer may gain."""
        removed = sum(self._removed_rows(one) * (one.d_in + one.bias) for one in self.producers)
        gained = 0 if self.consumer.bias else self.consumer.d_out
        return removed + (self.channels - self.width) * self.consumer.d_out - gained

    @property
    def saved_multiply_adds(self) -> int:
        """Per token."""
        removed = sum(self._removed_rows(one) * one.d_in for one in self.producers)
        return removed + (self.channels - self.width) * self.consumer.d_out

    def new_bytes(self, bytes_per_parameter: int) -> int:
        """Of the narrower layers."""
        return sum(layer.parameters for layer in self._left()) * bytes_per_parameter

    def _removed_rows(self, producer: Shape) -> int:
        return producer.d_out // self.channels * (self.channels - self.width)

    def check(self, layers: Layers) -> Layers:
        """The layers are there, and there are more channels than stay; what is left may be edited further."""
        what = f"narrow `{self.consumer.name}`"
        require_layers([one.layer for one in (*self.producers, self.consumer)], layers, what)
        fits = self.consumer.d_in == self.channels and all(one.d_out % self.channels == 0 for one in self.producers)
        if not fits or not self.producers or self.width >= self.channels:
            raise ModelError(
                f"{what}: cannot keep {self.width} of {self.channels} channels of layers "
                f"{', '.join(f'{one.d_out}×{one.d_in}' for one in (*self.producers, self.consumer))}",
                "the plan or checkpoint is damaged or belongs to another model",
            )
        return {**layers, **{one.name: one for one in self._left()}}

    def _left(self) -> list[Layer]:
        """The layers' new shapes."""
        producers = [Layer(one.name, one.d_in, one.d_out // self.channels * self.width, bias=one.bias) for one in self.producers]
        return [*producers, Layer(self.consumer.name, self.width, self.consumer.d_out, bias=True)]

    def coupling(self, statistics: Statistics) -> Coupling:
        """The MLP, in the groups of the statistics.

        Raises:
            StatisticsError: a layer is in no group.
        """
        groups: dict[str, InputGroup] = {
            layer.name: group.group for group in statistics.groups.values() for layer in group.group.layers
        }
        absent = [name for name in self.touches if name not in groups]
        if absent:
            raise StatisticsError(f"the statistics have no layer `{absent[0]}`", "run `fasc collect` with the same layers")
        group = groups[self.producers[0].name]
        producers = tuple(layer for layer in group.layers if layer.name in self.touches)
        return Coupling("channels", self.channels, group, producers, groups[self.consumer.name])

    def require(self, statistics: Statistics) -> None:
        """The consumer's inputs and gradients."""
        statistics.unit(self.coupling(statistics).consumer.unit()).require_gradient()

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Choose the channels as the forecast did, and cut the layers."""
        narrowing = self.choose(model, statistics)
        self.carry_out(model, statistics, narrowing)
        return narrowed(statistics, narrowing)

    def choose(self, model: PreTrainedModel, statistics: Statistics) -> Narrowing:
        """The channels that stay."""
        return choose_channels(model, statistics, self.coupling(statistics), self.width, self.damping)

    def carry_out(self, model: PreTrainedModel, statistics: Statistics, narrowing: Narrowing) -> None:
        """Replace the layers by narrower ones, in place.

        Args:
            model: changed in place.
            statistics: of the model before, for the mean of the channels that go.
            narrowing: what stays.

        Raises:
            NonFiniteError: the refitted weight holds NaN or infinity.
        """
        channels = narrowing.channels
        states: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            for producer in self.producers:
                weight = weight_of(model, producer.layer)
                rows = rows_of(channels.to(weight.device), self.channels, producer.d_out)
                states[producer.name] = {"weight": weight[rows]}
                bias = getattr(model.get_submodule(producer.name), "bias", None)
                if bias is not None:
                    states[producer.name]["bias"] = bias[rows]
            states[self.consumer.name] = self._refitted(model, statistics, narrowing)
            self.build(model)
            fill(model, states, f"`{self.consumer.name}` narrowed to {self.width} channels")
            record(model, self)

    def _refitted(self, model: PreTrainedModel, statistics: Statistics, narrowing: Narrowing) -> dict[str, Tensor]:
        """The consumer's weight on the channels that stay, and the bias for the mean of those that go."""
        weight = weight_of(model, self.consumer.layer).double()
        estimate = narrowing.estimate.to(weight)
        mean, _ = as_float64(statistics.group(narrowing.coupling.consumer.name).input, weight.device)
        offset = weight @ (mean - estimate @ mean[narrowing.channels.to(mean.device)])
        own = getattr(model.get_submodule(self.consumer.name), "bias", None)
        return {"weight": weight @ estimate, "bias": offset if own is None else offset + own.double()}

    def build(self, model: nn.Module) -> None:
        """Narrower ``nn.Linear``s."""
        for layer in self._left():
            with empty_modules():
                module = nn.Linear(layer.d_in, layer.d_out, bias=layer.bias)
            put_module(model, layer.name, module)
