"""Remove: whole heads or channels of a block go without a refit, the same number in every block (structured pruning)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import ClassVar, Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from fasc.edits._registry import Edit, Layers, edit_kind, require_layers
from fasc.edits.narrow import Shape
from fasc.errors import ModelError
from fasc.model.coupling import Coupling, Part, head_sizes, rows_of
from fasc.model.experts import Expert, fuse, is_fused, unfuse
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

    def require(self, statistics: Statistics) -> None:
        """The moments that say which parts are important."""
        self._importance(statistics)

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Keep the most important parts, and say the new sizes in the model's config."""
        stay = self._importance(statistics).argsort(descending=True, stable=True)[: self.count].sort().values.to(model.device)
        for producer in self.producers:
            module = model.get_submodule(producer.name)
            rows = self._rows_of(producer, stay)
            module.weight, module.out_features = _rows(module.weight, rows, 0), len(rows)
            if producer.bias:
                module.bias = _rows(module.bias, rows, 0)
        module = model.get_submodule(self.consumer.name)
        columns = _positions(stay, self.consumer.d_in // self.parts)
        module.weight, module.in_features = _rows(module.weight, columns, 1), len(columns)
        self._resize(model.config.get_text_config())
        return statistics

    def _rows_of(self, producer: Shape, stay: Tensor) -> Tensor:
        """A head's rows lie together; those of a channel in a fused ``gate_up`` do not."""
        if self.part == "heads":
            return _positions(stay, producer.d_out // self.parts)
        return rows_of(stay, self.parts, producer.d_out)

    def _importance(self, statistics: Statistics) -> Tensor:
        """Of each part, [parts]; the consumer is the one layer of its group."""
        return get_structured(self.method).importance(statistics.group(self.consumer.name), self.parts)

    def _resize(self, config: PretrainedConfig) -> None:
        """Say in a config how many parts stay."""
        if self.part == "heads":
            width = head_sizes(config)[2]
            served = self.consumer.d_in // self.parts // width  # query heads for each key-value head
            config.num_attention_heads, config.num_key_value_heads, config.head_dim = self.count * served, self.count, width
        else:
            own = self.consumer.layer.expert is not None and hasattr(config, "moe_intermediate_size")
            setattr(config, "moe_intermediate_size" if own else "intermediate_size", self.count)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the tensors that stay, by their names in the model's state."""
        shapes: dict[str, tuple[int, ...]] = {}
        for producer in self.producers:
            rows = producer.d_out // self.parts * self.count
            shapes[f"{producer.name}.weight"] = (rows, producer.d_in)
            if producer.bias:
                shapes[f"{producer.name}.bias"] = (rows,)
        shapes[f"{self.consumer.name}.weight"] = (self.consumer.d_out, self.consumer.d_in // self.parts * self.count)
        return shapes


def require_loadable(model: PreTrainedModel, edits: Sequence[Edit]) -> None:
    """See, before parts are removed, that a model built from the smaller config has the very shapes that will be left.

    Raises:
        ModelError: the smaller config does not describe the smaller weights.
    """
    removals = [edit for edit in edits if isinstance(edit, Remove)]
    if not removals:
        return
    config = deepcopy(model.config)
    left = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    heads = head_sizes(config.get_text_config())[1]
    for edit in removals:
        if edit.part == "heads" and edit.parts != heads:
            raise ModelError(
                f"`{edit.consumer.name}` reads {heads} heads here and {edit.parts} in the plan", "the plan is damaged"
            )
        edit._resize(config.get_text_config())
        left |= edit._shapes()
    with torch.device("meta"):
        fresh = AutoModelForCausalLM.from_config(config)
        if any(isinstance(module, Expert) for module in model.modules()):
            for module in [one for one in fresh.modules() if is_fused(one)]:
                unfuse(module, empty=True)
    expected = {name: tuple(tensor.shape) for name, tensor in fresh.state_dict().items()}
    for name, shape in left.items():
        if expected.get(name) != shape:
            raise ModelError(
                f"`{name}` is {shape} after pruning and {expected.get(name)} by the smaller config",
                f"structured pruning does not know how {type(model).__name__} is built, or the plan is damaged",
            )


@contextmanager
def experts_apart(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """Let parts be removed from the experts of a mixture, as many from each: they are fused again when the body is done."""
    touched = {name for edit in edits if isinstance(edit, Remove) for name in edit.touches}
    holders = [one for name, one in model.named_modules() if is_fused(one) and any(x.startswith(f"{name}.") for x in touched)]
    for experts in holders:
        unfuse(experts)
    try:
        yield
    finally:
        for experts in holders:
            fuse(experts)


def _rows(parameter: nn.Parameter, stay: Tensor, axis: int) -> nn.Parameter:
    return nn.Parameter(parameter.detach().index_select(axis, stay), requires_grad=parameter.requires_grad)


def _positions(stay: Tensor, size: int) -> Tensor:
    return (stay[:, None] * size + torch.arange(size, device=stay.device)).flatten()
