"""Unfuse: the experts of a mixture become layers of their own, so that each can be factored or narrowed (docs/decisions/0017)."""

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import BaseModel, PositiveInt
from torch import nn
from transformers import PreTrainedModel

from fasc.edits._registry import Edit, Layers, edit_kind
from fasc.edits.structure import empty_modules, record
from fasc.errors import ModelError
from fasc.model.experts import fused_sizes, save_as_they_are, unfuse
from fasc.model.layers import Layer
from fasc.statistics.moments import Statistics


class Holder(BaseModel, frozen=True, extra="forbid"):
    """A module that holds fused experts."""

    name: str
    experts: PositiveInt
    first: Literal["gate_up_proj", "up_proj"]
    d_in: PositiveInt
    d_first: PositiveInt
    """Outputs of the first projection: twice the channels where it makes gate and up."""

    channels: PositiveInt
    bias: bool

    @property
    def layers(self) -> dict[str, Layer]:
        """Of every expert."""
        layers = {}
        for index in range(self.experts):
            for name, d_in, d_out in ((self.first, self.d_in, self.d_first), ("down_proj", self.channels, self.d_in)):
                full = f"{self.name}.{index}.{name}"
                layers[full] = Layer(full, d_in, d_out, bias=self.bias)
        return layers


@edit_kind("unfuse")
class Unfuse(Edit):
    """All fused experts of a model, in all blocks: a checkpoint holds them one way or the other."""

    edit: Literal["unfuse"] = "unfuse"
    holders: tuple[Holder, ...]
    predicted_loss: float | None = 0.0
    structural: ClassVar[bool] = True
    keeps_weights: ClassVar[bool] = True

    @staticmethod
    def of(model: nn.Module) -> "Unfuse | None":
        """The edit for a model; ``None`` where it has no fused experts."""
        holders = tuple(Holder(name=name, **sizes) for name, sizes in fused_sizes(model).items())
        return Unfuse(holders=holders) if holders else None

    @property
    def touches(self) -> tuple[str, ...]:
        """Every expert's layers."""
        return tuple(name for holder in self.holders for name in holder.layers)

    @property
    def saved(self) -> int:
        """Nothing: the same numbers in other tensors."""
        return 0

    @property
    def saved_multiply_adds(self) -> int:
        """None."""
        return 0

    def saved_bytes(self, bytes_per_parameter: int) -> int:
        """Nothing, and a number stays in the place of each fused tensor."""
        return -sum(4 if holder.bias else 2 for holder in self.holders) * bytes_per_parameter

    def check(self, layers: Layers) -> Layers:
        """The experts' layers are there from here on; under :func:`~fasc.model.experts.expert_layers` they are there before."""
        own = {name: layer for holder in self.holders for name, layer in holder.layers.items()}
        if len({holder.name for holder in self.holders}) < len(self.holders):
            raise ModelError("unfuse: a module is listed twice", "the plan or checkpoint is damaged")
        other = next((name for name, layer in own.items() if name in layers and layers[name] != layer), None)
        if other is not None:
            raise ModelError(f"unfuse: `{other}` has another shape in this model", "the plan belongs to another model")
        return {**layers, **own}

    def require(self, statistics: Statistics) -> None:
        """Nothing."""

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Every expert gets its own copy of its weights; the fused ones go."""
        self._require(model)
        for holder in self.holders:
            unfuse(model.get_submodule(holder.name))
        save_as_they_are(model)
        record(model, self)
        return statistics

    def build(self, model: nn.Module) -> None:
        """Empty layers for every expert."""
        self._require(model)
        with empty_modules():
            for holder in self.holders:
                unfuse(model.get_submodule(holder.name), empty=True)

    def _require(self, model: nn.Module) -> None:
        here = fused_sizes(model)
        for holder in self.holders:
            if here.get(holder.name) != holder.model_dump(exclude={"name"}):
                raise ModelError(
                    f"unfuse: `{holder.name}` holds no such experts", "the plan or checkpoint belongs to another model"
                )


def with_experts_unfused(model: nn.Module, edits: Sequence[Edit]) -> list[Edit]:
    """Edits, after the one that makes layers of a model's experts where one of them works on such a layer."""
    whole = Unfuse.of(model)
    if whole is None or set(whole.touches).isdisjoint(name for edit in edits for name in edit.touches):
        return list(edits)
    return [whole, *edits]
