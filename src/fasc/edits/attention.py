"""Heads and Values: an attention keeps fewer key-value heads, or fewer features of each value head, its output layer refitted."""

from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.edits._registry import Edit, Layers, edit_kind, require_layers
from fasc.edits.narrow import Shape
from fasc.edits.structure import empty_modules, fill, put_module, record
from fasc.errors import ModelError, StatisticsError
from fasc.forecast.attention import Values as ValueHeads
from fasc.forecast.attention import choose_heads, choose_values
from fasc.model.attention import with_values_of
from fasc.model.coupling import Coupling
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer, weight_of
from fasc.statistics.moments import Statistics, as_float64
from fasc.statistics.reduction import Reduction, reduced


class _Reduced(Edit):
    """The consumer of an attention reads fewer features, and producers make fewer."""

    producers: tuple[Shape, ...]
    consumer: Shape
    heads: PositiveInt
    """Key-value heads that there are."""

    damping: NonNegativeFloat = 1e-4
    """Relative, of both covariances."""

    @abstractmethod
    def _share(self) -> tuple[int, int]:
        """Features that stay of so many."""

    @abstractmethod
    def _possible(self) -> bool:
        """Whether the sizes fit each other."""

    @abstractmethod
    def _what(self) -> str:
        """What is kept, in words."""

    @abstractmethod
    def choose(self, model: PreTrainedModel, statistics: Statistics) -> Reduction:
        """What stays, as the forecast chose it."""

    def _left_of(self, size: int) -> int:
        stay, whole = self._share()
        return size // whole * stay

    @property
    def touches(self) -> tuple[str, ...]:
        """Producers and consumer."""
        return (*(one.name for one in self.producers), self.consumer.name)

    @property
    def saved(self) -> int:
        """Rows and columns, less the bias that the consumer may gain."""
        rows = sum((one.d_out - self._left_of(one.d_out)) * (one.d_in + one.bias) for one in self.producers)
        columns = (self.consumer.d_in - self._left_of(self.consumer.d_in)) * self.consumer.d_out
        return rows + columns - (0 if self.consumer.bias else self.consumer.d_out)

    @property
    def saved_multiply_adds(self) -> int:
        """Per token, of the layers alone: attention over positions saves more."""
        rows = sum((one.d_out - self._left_of(one.d_out)) * one.d_in for one in self.producers)
        return rows + (self.consumer.d_in - self._left_of(self.consumer.d_in)) * self.consumer.d_out

    def new_bytes(self, bytes_per_parameter: int) -> int:
        """Of the smaller layers."""
        return sum(layer.parameters for layer in self.left()) * bytes_per_parameter

    def check(self, layers: Layers) -> Layers:
        """The layers are there, and there is more than stays; what is left may be edited further."""
        require_layers([one.layer for one in (*self.producers, self.consumer)], layers, f"{self.edit} `{self.consumer.name}`")
        stay, whole = self._share()
        sizes = [self.consumer.d_in, *(one.d_out for one in self.producers)]
        if not self.producers or stay >= whole or any(size % whole for size in sizes) or not self._possible():
            raise ModelError(
                f"{self.edit} `{self.consumer.name}`: cannot keep {self._what()} of layers "
                f"{', '.join(f'{one.d_out}×{one.d_in}' for one in (*self.producers, self.consumer))}",
                "the plan or checkpoint is damaged or belongs to another model",
            )
        return {**layers, **{one.name: one for one in self.left()}}

    def left(self) -> list[Layer]:
        """The layers' new shapes."""
        producers = [Layer(one.name, one.d_in, self._left_of(one.d_out), bias=one.bias) for one in self.producers]
        return [*producers, Layer(self.consumer.name, self._left_of(self.consumer.d_in), self.consumer.d_out, bias=True)]

    def coupling(self, statistics: Statistics) -> Coupling:
        """The attention, in the groups of the statistics.

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
        return Coupling("heads", self.heads, group, producers, groups[self.consumer.name])

    def require(self, statistics: Statistics) -> None:
        """The consumer's inputs and gradients."""
        statistics.unit(self.coupling(statistics).consumer.unit()).require_gradient()

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Choose what stays as the forecast did, and replace the layers by smaller ones."""
        reduction = self.choose(model, statistics)
        states: dict[str, dict[str, Tensor]] = {}
        with torch.no_grad():
            for producer in self.producers:
                rows = reduction.producers[producer.name].rows
                weight = weight_of(model, producer.layer)
                states[producer.name] = {"weight": rows.to(weight.device) @ weight.double()}
                bias = getattr(model.get_submodule(producer.name), "bias", None)
                if bias is not None:
                    states[producer.name]["bias"] = rows.to(bias.device) @ bias.double()
            states[self.consumer.name] = self._refitted(model, statistics, reduction)
            self.build(model)
            fill(model, states, f"`{self.consumer.name}` with {self._what()}")
            record(model, self)
        return reduced(statistics, reduction)

    def _refitted(self, model: PreTrainedModel, statistics: Statistics, reduction: Reduction) -> dict[str, Tensor]:
        """The consumer's weight on what stays, and the bias for the mean of what goes."""
        weight = weight_of(model, self.consumer.layer).double()
        estimate, reads = reduction.estimate.to(weight), reduction.reads.to(weight)
        mean, _ = as_float64(statistics.group(self.consumer.name).input, weight.device)
        offset = weight @ (mean - estimate @ (reads @ mean))
        own = getattr(model.get_submodule(self.consumer.name), "bias", None)
        return {"weight": weight @ estimate, "bias": offset if own is None else offset + own.double()}

    def build(self, model: nn.Module) -> None:
        """Smaller ``nn.Linear``s."""
        for layer in self.left():
            with empty_modules():
                module = nn.Linear(layer.d_in, layer.d_out, bias=layer.bias)
            put_module(model, layer.name, module)


def _shapes(coupling: Coupling) -> tuple[tuple[Shape, ...], Shape]:
    *producers, consumer = (Shape(layer.name, layer.d_in, layer.d_out, layer.bias) for layer in coupling.layers)
    return tuple(producers), consumer


@edit_kind("heads")
class Heads(_Reduced):
    """Key-value heads of one attention are removed with the query heads that they serve."""

    edit: Literal["heads"] = "heads"
    count: PositiveInt
    """How many stay."""

    word: ClassVar[str] = "heads"
    """Allows it in ``--layouts``."""

    @staticmethod
    def of(coupling: Coupling, count: int, damping: float, loss: float | None = None) -> "Heads":
        """The edit that leaves an attention so many key-value heads."""
        producers, consumer = _shapes(coupling)
        heads = coupling.parts
        return Heads(producers=producers, consumer=consumer, heads=heads, count=count, damping=damping, predicted_loss=loss)

    def _share(self) -> tuple[int, int]:
        return self.count, self.heads

    def _possible(self) -> bool:
        return True

    def _what(self) -> str:
        return f"{self.count} of {self.heads} key-value heads"

    def choose(self, model: PreTrainedModel, statistics: Statistics) -> Reduction:
        """The heads that stay."""
        return choose_heads(model, statistics, self.coupling(statistics), self.count, self.damping)


@edit_kind("values")
class Values(_Reduced):
    """The value heads of one attention have fewer features; the cache of values shrinks with them."""

    edit: Literal["values"] = "values"
    width: PositiveInt
    """Features of a value head."""

    size: PositiveInt
    """How many stay."""

    word: ClassVar[str] = "values"
    """Allows it in ``--layouts``."""

    @staticmethod
    def of(coupling: Coupling, value: str, size: int, damping: float, loss: float | None = None) -> "Values":
        """The edit that leaves so many features of each value head.

        Args:
            coupling: the attention's layers.
            value: name of the value projection.
            size: how many stay.
            damping: relative, of both covariances.
            loss: forecast.
        """
        producers, consumer = _shapes(coupling)
        own = next(one for one in producers if one.name == value)
        return Values(
            producers=(own,),
            consumer=consumer,
            heads=coupling.parts,
            width=own.d_out // coupling.parts,
            size=size,
            damping=damping,
            predicted_loss=loss,
        )

    @property
    def places(self) -> tuple[str, ...]:
        """The attention itself, whose forward pass gives values their own width."""
        return (self.consumer.name.rpartition(".")[0],)

    def _share(self) -> tuple[int, int]:
        return self.size, self.width

    def _possible(self) -> bool:
        same = {one.name.rpartition(".")[0] for one in (*self.producers, self.consumer)}
        return len(self.producers) == len(same) == 1 and self.producers[0].d_out == self.heads * self.width

    def _what(self) -> str:
        return f"{self.size} of {self.width} features of {self.heads} value heads"

    def choose(self, model: PreTrainedModel, statistics: Statistics) -> Reduction:
        """The subspace of each value head that stays."""
        values = ValueHeads(self.coupling(statistics), self.producers[0].name, self.heads)
        return choose_values(model, statistics, values, self.size, self.damping)

    def build(self, model: nn.Module) -> None:
        """Smaller layers, in an attention with values of their own width."""
        with_values_of(model, self.consumer.name, self.size)
        super().build(model)
