"""Skip: an attention or an MLP is left out, and its mean output stands in its place."""

from dataclasses import replace
from typing import ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import nn
from transformers import PreTrainedModel

from fasc.edits._registry import Edit, Layers, edit_kind, require_layers, require_members
from fasc.edits.narrow import Shape
from fasc.edits.structure import fill, record
from fasc.errors import ModelError
from fasc.model.layers import weight_of
from fasc.model.sublayers import Kind, Sublayer, leave_out
from fasc.statistics.moments import Statistics, as_float64


@edit_kind("skip")
class Skip(Edit):
    """A sublayer that is not computed at all."""

    edit: Literal["skip"] = "skip"
    sublayer: str
    """Qualified name of its module."""

    kind: Kind
    layers: tuple[Shape, ...] = Field(min_length=2)
    """All linear layers in it, the one that makes its output last."""

    returns: NonNegativeInt
    """Values that it returns beside its output."""

    others: NonNegativeInt
    """Parameters in it beside those of the layers."""

    word: ClassVar[str] = "skip"
    """Allows it in ``--layouts``."""

    @staticmethod
    def of(sublayer: Sublayer, loss: float | None = None) -> "Skip":
        """The edit that leaves a sublayer out."""
        layers = tuple(Shape(layer.name, layer.d_in, layer.d_out, layer.bias) for layer in sublayer.layers)
        return Skip(
            sublayer=sublayer.name,
            kind=sublayer.kind,
            layers=layers,
            returns=sublayer.returns,
            others=sublayer.others,
            predicted_loss=loss,
        )

    @property
    def last(self) -> Shape:
        """The layer that makes the output."""
        return self.layers[-1]

    @property
    def touches(self) -> tuple[str, ...]:
        """All linear layers of the sublayer."""
        return tuple(one.name for one in self.layers)

    @property
    def places(self) -> tuple[str, ...]:
        """The sublayer's module."""
        return (self.sublayer,)

    @property
    def makes(self) -> tuple[str, ...]:
        """The module that holds the mean."""
        return (self.sublayer,)

    @property
    def saved(self) -> int:
        """All but the mean."""
        return sum(one.layer.parameters for one in self.layers) + self.others - self.last.d_out

    @property
    def saved_multiply_adds(self) -> int:
        """All."""
        return sum(one.d_in * one.d_out for one in self.layers)

    def saved_bytes(self, bytes_per_parameter: int) -> int:
        """All but the mean and one number."""
        return (self.saved - 1) * bytes_per_parameter

    def new_bytes(self, bytes_per_parameter: int) -> int:
        """Of the mean and of one number."""
        return (self.last.d_out + 1) * bytes_per_parameter

    def check(self, layers: Layers) -> Layers:
        """The layers are there and lie in the sublayer; nothing may be done to them afterwards."""
        what = f"skip `{self.sublayer}`"
        require_layers([one.layer for one in self.layers], layers, what)
        inside = {name for name in layers if name.startswith(f"{self.sublayer}.")}
        if inside != set(self.touches):
            stranger = min(inside ^ set(self.touches))
            raise ModelError(
                f"{what}: the sublayer and the edit differ in `{stranger}`", "the plan or checkpoint belongs to another model"
            )
        return {name: layer for name, layer in layers.items() if name not in self.touches}

    def require(self, statistics: Statistics) -> None:
        """The mean of what the last layer reads."""
        require_members(statistics, self.last.name, [self.last.name])

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Put the mean output where the sublayer is."""
        with torch.no_grad():
            weight = weight_of(model, self.last.layer).double()
            mean, _ = as_float64(statistics.group(self.last.name).input, weight.device)
            bias = getattr(model.get_submodule(self.last.name), "bias", None)
            output = weight @ mean if bias is None else weight @ mean + bias.double()
            self.build(model)
            fill(model, {self.sublayer: {"mean": output}}, f"`{self.sublayer}` left out")
            record(model, self)
        gone = set(self.touches)
        groups = {name: one for name, one in statistics.groups.items() if gone.isdisjoint(x.name for x in one.group.layers)}
        return replace(statistics, groups=groups)

    def build(self, model: nn.Module) -> None:
        """The module that holds the mean."""
        leave_out(model, self.sublayer, self.last.layer, self.returns)
