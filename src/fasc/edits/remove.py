"""Remove: whole heads or channels of a block go without a refit, the same number in every block (structured pruning)."""

from collections.abc import Sequence
from copy import deepcopy
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fasc.edits._registry import Edit, Layers, edit_kind, require_layers
from fasc.edits.narrow import Shape
from fasc.errors import ModelError
from fasc.model.coupling import Coupling, Part, head_sizes
from fasc.pruning import get_structured
from fasc.statistics.moments import Statistics


@edit_kind("remove")
class Remove(Edit):
    """Parts of one attention or one MLP: some rows of the producers and some columns of the consumer."""

    edit: Literal["remove"] = "remove"
    part: Part
    parts: PositiveInt
    """Key-value heads with the query heads they serve, or channels."""

    count: PositiveInt
    """How many stay."""

    producers: tuple[Shape, ...]
    consumer: Shape
    consumer_group: str
    method: str
    structural: ClassVar[bool] = False

    @staticmethod
    def of(coupling: Coupling, count: int, method: str) -> "Remove":
        """The edit that leaves so many parts."""
        *producers, consumer = (Shape(layer.name, layer.d_in, layer.d_out, layer.bias) for layer in coupling.layers)
        return Remove(
            part=coupling.part,
            parts=coupling.parts,
            count=count,
            producers=tuple(producers),
            consumer=consumer,
            consumer_group=coupling.consumer.name,
            method=method,
        )

    @property
    def touches(self) -> tuple[str, ...]:
        """Producers and consumer."""
        return (*(one.name for one in self.producers), self.consumer.name)

    @property
    def saved(self) -> int:
        """Rows, their biases, and columns."""
        share = self.parts - self.count
        rows = sum(share * (one.d_out // self.parts) * (one.d_in + one.bias) for one in self.producers)
        return rows + share * (self.consumer.d_in // self.parts) * self.consumer.d_out

    @property
    def saved_multiply_adds(self) -> int:
        """Per token, of the layers alone."""
        share = self.parts - self.count
        rows = sum(share * (one.d_out // self.parts) * one.d_in for one in self.producers)
        return rows + share * (self.consumer.d_in // self.parts) * self.consumer.d_out

    def check(self, layers: Layers) -> Layers:
        """The layers are there and have so many parts."""
        what = f"remove {self.part} of `{self.consumer.name}`"
        require_layers([one.layer for one in (*self.producers, self.consumer)], layers, what)
        divides = all(size % self.parts == 0 for size in (self.consumer.d_in, *(one.d_out for one in self.producers)))
        if not divides or self.count > self.parts:
            raise ModelError(f"{what}: cannot keep {self.count} of {self.parts}", "the plan is damaged")
        return {name: layer for name, layer in layers.items() if name not in self.touches}

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Keep the most important parts, and say the new sizes in the model's config."""
        importance = get_structured(self.method).importance(statistics.group(self.consumer_group), self.parts)
        stay = importance.argsort(descending=True, stable=True)[: self.count].sort().values.to(model.device)
        for producer in self.producers:
            module = model.get_submodule(producer.name)
            rows = _positions(stay, producer.d_out // self.parts)
            module.weight, module.out_features = _rows(module.weight, rows, 0), len(rows)
            if producer.bias:
                module.bias = _rows(module.bias, rows, 0)
        module = model.get_submodule(self.consumer.name)
        columns = _positions(stay, self.consumer.d_in // self.parts)
        module.weight, module.in_features = _rows(module.weight, columns, 1), len(columns)
        config = model.config.get_text_config()
        if self.part == "heads":
            width = head_sizes(config)[2]
            served = self.consumer.d_in // self.parts // width  # query heads for each key-value head
            config.num_attention_heads, config.num_key_value_heads, config.head_dim = self.count * served, self.count, width
        else:
            config.intermediate_size = self.count
        return statistics


def require_loadable(model: PreTrainedModel, edits: Sequence[Edit]) -> None:
    """See that a model built from the smaller config has these very shapes.

    Raises:
        ModelError: the smaller config does not describe the smaller weights.
    """
    if not any(isinstance(edit, Remove) for edit in edits):
        return
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(deepcopy(model.config))
    expected = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    for name, tensor in model.state_dict().items():
        if expected.get(name) != tuple(tensor.shape):
            raise ModelError(
                f"`{name}` is {tuple(tensor.shape)} after pruning and {expected.get(name)} by the smaller config",
                f"structured pruning does not know how {type(model).__name__} is built",
            )


def _rows(parameter: nn.Parameter, stay: Tensor, axis: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(axis, stay), requires_grad=parameter.requires_grad)


def _positions(stay: Tensor, size: int) -> Tensor:
    return (stay[:, None] * size + torch.arange(size, device=stay.device)).flatten()
