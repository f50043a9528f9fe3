"""Mask: the weights of a layer that score lowest become zeros, which stay stored (unstructured pruning)."""

from typing import ClassVar, Literal

import torch
from pydantic import NonNegativeInt, PositiveInt
from transformers import PreTrainedModel

from fasc.edits._registry import Edit, Layers, edit_kind, require_layers, require_members
from fasc.errors import ModelError
from fasc.model.layers import Layer, weight_of
from fasc.pruning import get_unstructured
from fasc.statistics.moments import Statistics


@edit_kind("mask")
class Mask(Edit):
    """Zeros in one layer."""

    edit: Literal["mask"] = "mask"
    group: str
    layer: str
    d_in: PositiveInt
    d_out: PositiveInt
    bias: bool
    weights: NonNegativeInt
    """How many stay."""

    method: str
    structural: ClassVar[bool] = False

    @property
    def touches(self) -> tuple[str, ...]:
        """The layer."""
        return (self.layer,)

    @property
    def saved(self) -> int:
        """Weights that are zero."""
        return self.d_in * self.d_out - self.weights

    @property
    def saved_multiply_adds(self) -> int:
        """None: an ordinary product multiplies by zeros."""
        return 0

    def saved_bytes(self, bytes_per_parameter: int) -> int:
        """None: zeros are stored."""
        del bytes_per_parameter
        return 0

    def check(self, layers: Layers) -> Layers:
        """The layer is there and has so many weights."""
        require_layers([Layer(self.layer, self.d_in, self.d_out, bias=self.bias)], layers, f"mask `{self.layer}`")
        if self.weights > self.d_in * self.d_out:
            raise ModelError(
                f"mask `{self.layer}`: {self.weights:,} weights of {self.d_in * self.d_out:,}", "the plan is damaged"
            )
        return {name: layer for name, layer in layers.items() if name != self.layer}

    def require(self, statistics: Statistics) -> None:
        """The group's inputs."""
        get_unstructured(self.method)
        require_members(statistics, self.group, self.touches)

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Write the zeros."""
        pruning = get_unstructured(self.method)
        with torch.no_grad():
            weight = weight_of(model, Layer(self.layer, self.d_in, self.d_out, bias=self.bias))
            scores = pruning.score(weight.float(), statistics.group(self.group))
            rows = scores if pruning.by_row else scores.flatten()[None]
            lowest = rows.argsort(dim=1, stable=True)[:, : rows.shape[1] - self.weights // rows.shape[0]]
            mask = torch.ones_like(rows, dtype=torch.bool).scatter_(1, lowest, value=False)
            weight.mul_(mask.view_as(weight))
        return statistics
