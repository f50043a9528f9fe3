"""Quantise: the matrices of a unit, dense or factored, become codes of few bits."""

from collections.abc import Mapping
from math import prod
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.edits._registry import Edit, Layers, edit_kind, require_members
from fasc.edits.structure import empty_modules, fill, put_module, record
from fasc.errors import ModelError
from fasc.forecast.rounding import rounding_loss
from fasc.layouts.quantised import QuantisedLinear, linear_maps, quantised_bytes, quantised_like
from fasc.linalg.rounding import Rounded, feedback, rounded
from fasc.model.layers import oriented_weight
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GroupStatistics, Statistics, as_float64

Bits = Annotated[int, Field(ge=1, le=8)]

DAMPING = 1e-3
"""Relative, of the inputs' moment: less than this trusts directions that the calibration has hardly seen."""


class Reads:
    """Mean and covariance of what a matrix of a layer reads, and its mean output before anything was rounded."""

    def __init__(self, inputs: Covariance, matrix: Tensor | None, offset: Tensor | None, device: torch.device) -> None:
        mean, covariance = as_float64(inputs, device)
        if matrix is not None:
            a = matrix.detach().double()
            mean, covariance = a @ mean, a @ covariance @ a.mT
        self.mean = mean if offset is None else mean + offset.detach().double()
        self.covariance = covariance


@edit_kind("quantise")
class Quantise(Edit):
    """The matrices of a unit's layers, as earlier edits have left them, rounded to so many bits."""

    edit: Literal["quantise"] = "quantise"
    group: str
    """Name of the input group."""

    layers: tuple[str, ...]
    """Qualified names of the unit's layers."""

    maps: tuple[tuple[PositiveInt, PositiveInt], ...]
    """Inputs and outputs of the matrices that they are stored in, see :meth:`~fasc.layouts.Layout.maps`."""

    bits: Bits
    group_size: PositiveInt = 64
    """Neighbouring inputs that share a scale."""

    damping: NonNegativeFloat = DAMPING

    @property
    def touches(self) -> tuple[str, ...]:
        """The unit's layers."""
        return self.layers

    @property
    def saved(self) -> int:
        """None: there are as many weights as before."""
        return 0

    @property
    def saved_multiply_adds(self) -> int:
        """None."""
        return 0

    @property
    def weights(self) -> int:
        """How many are rounded."""
        return sum(map(prod, self.maps))

    def saved_bytes(self, bytes_per_parameter: int) -> int:
        """Codes, scales and zeros in the place of the weights."""
        return self.weights * bytes_per_parameter - self.new_bytes(bytes_per_parameter)

    def new_bytes(self, bytes_per_parameter: int) -> int:
        """Of codes, scales and zeros, and one number for each matrix."""
        codes = sum(quantised_bytes(d_in, d_out, self.bits, self.group_size) for d_in, d_out in self.maps)
        return codes + len(self.maps) * bytes_per_parameter

    def check(self, layers: Layers) -> Layers:
        """The layers are there, dense or factored, each once; nothing may be done to them afterwards."""
        absent = [name for name in self.layers if name not in layers]
        if absent or not self.layers or len(set(self.layers)) < len(self.layers):
            what = absent[0] if absent else ", ".join(self.layers)
            raise ModelError(
                f"quantise: `{what}` is no layer of this model, or is rounded already",
                "the plan or checkpoint belongs to another model",
            )
        return {name: layer for name, layer in layers.items() if name not in self.layers}

    def require(self, statistics: Statistics) -> None:
        """The moments of the layers' inputs."""
        require_members(statistics, self.group, self.layers)

    def apply(self, model: PreTrainedModel, statistics: Statistics) -> Statistics:
        """Round with error feedback, one matrix after the other, each from the inputs that the rounded ones before it make."""
        group = statistics.group(self.group)
        self._check_weights(model)
        with torch.no_grad():
            # Rounding moves the mean of the outputs; a bias further on makes that good, so that only the covariance counts. The
            # means are taken before a projection that several layers share is rounded.
            means = {name: _mean_outputs(model.get_submodule(name), group.input) for name in self.layers}
            losses = [self._round_layer(model, name, group, means[name]) for name in self.layers]
        known = None if any(loss is None for loss in losses) else sum(loss for loss in losses if loss is not None)
        record(model, self.with_loss(known if self.predicted_loss is None else self.predicted_loss))
        return statistics

    def _round_layer(
        self, model: PreTrainedModel, name: str, group: GroupStatistics, means: Mapping[str, Tensor]
    ) -> float | None:
        """Round a layer's matrices; gives π · ½J of a dense one whose output scale is known."""
        layer = model.get_submodule(name)
        loss = None
        for path, matrix, offset in linear_maps(layer):
            old, where = _within(layer, path), f"{name}.{path}".rstrip(".")
            weight = _weight(old)
            reads = Reads(group.input, matrix, offset, weight.device)
            bias = getattr(old, "bias", None)
            centred = bias is not None or bool(path)
            moment = reads.covariance if centred else reads.covariance + torch.outer(reads.mean, reads.mean)
            inputs = feedback(moment, self.damping, where=f"`{where}`: the inputs'", tokens=group.tokens)
            result = rounded(weight.float(), inputs, self.bits, self.group_size)
            scale = group.extras.get(f"output_scale/{name}")
            if not path and scale is not None:
                loss = rounding_loss(weight - result.dense(), moment, scale, group.unit(name).share)
            state = QuantisedLinear.state_of(result)
            if bias is not None:
                state["bias"] = bias.double() + means[path] - result.dense().double() @ reads.mean
            self._place(model, where, old, result, state)
            layer = model.get_submodule(name)
        return loss

    def _place(self, model: PreTrainedModel, where: str, old: nn.Module, result: Rounded, state: dict[str, Tensor]) -> None:
        with empty_modules():
            new = quantised_like(old, _shape(result.codes), self.bits, self.group_size)
        put_module(model, where, new)
        fill(model, {where: state}, f"`{where}` in {self.bits} bits")

    def _check_weights(self, model: nn.Module) -> None:
        """Raise ``ModelError`` unless the layers are stored in as many weights as the edit says."""
        weights = 0
        for name in self.layers:
            layer = model.get_submodule(name)
            weights += sum(_weight(_within(layer, path)).numel() for path, _, _ in linear_maps(layer))
        if weights != self.weights:
            raise ModelError(
                f"quantise `{self.layers[0]}`: {weights:,} weights here and {self.weights:,} in the plan",
                "the plan or checkpoint is damaged or belongs to another model",
            )

    def build(self, model: nn.Module) -> None:
        """Empty modules of codes in the place of every matrix."""
        self._check_weights(model)
        for name in self.layers:
            for path, _, _ in linear_maps(model.get_submodule(name)):
                where = f"{name}.{path}".rstrip(".")
                old = model.get_submodule(where)
                with empty_modules():
                    new = quantised_like(old, _shape(_weight(old)), self.bits, self.group_size)
                put_module(model, where, new)


def _mean_outputs(layer: nn.Module, inputs: Covariance) -> dict[str, Tensor]:
    """Mean output of each matrix of a layer, without its bias."""
    means = {}
    for path, matrix, offset in linear_maps(layer):
        weight = _weight(_within(layer, path)).double()
        means[path] = weight @ Reads(inputs, matrix, offset, weight.device).mean
    return means


def _shape(matrix: Tensor) -> tuple[int, int]:
    return matrix.shape[0], matrix.shape[1]


def _within(layer: nn.Module, path: str) -> nn.Module:
    return layer.get_submodule(path) if path else layer


def _weight(module: nn.Module) -> Tensor:
    weight = oriented_weight(module)
    if weight is None:
        raise ModelError(f"a {type(module).__name__} cannot be rounded", "it holds no matrix of floating-point numbers")
    return weight.detach()
