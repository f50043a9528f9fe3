"""Which layers of a model may be compressed, and how to read a weight from each.

A :class:`Layer` is a linear map ``d_in → d_out`` somewhere in the model. It says where its weight lives and nothing about
how it is stored there: the table at the end of this file is the only place that knows the storage of a layer type.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fasc.errors import ModelError
from fasc.model.offload import numbers_of
from fasc.model.options import LayersConfig

_EXPERT = re.compile(r"\.experts\.(\d+)\.")
_FIRST_INDEX = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear map that may be compressed."""

    name: str
    """Qualified name, unique in the model."""

    d_in: int
    d_out: int

    bias: bool
    """Whether the dense layer already has a bias."""

    @property
    def parameters(self) -> int:
        """Of the dense layer, its bias included."""
        return (self.d_in + self.bias) * self.d_out

    @property
    def block(self) -> int | None:
        """Index of the decoder block the layer belongs to, or ``None`` outside the blocks."""
        found = _FIRST_INDEX.search(self.name)
        return int(found.group(1)) if found else None

    @property
    def expert(self) -> int | None:
        """Index of the expert the layer belongs to, or ``None`` outside a mixture of experts."""
        found = _EXPERT.search(self.name)
        return int(found.group(1)) if found else None

    @property
    def kind(self) -> str:
        """Last part of the name, such as ``q_proj`` or ``c_attn``."""
        return self.name.rpartition(".")[2]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def expert_of(layer: str) -> str | None:
    """Name of the expert that a layer belongs to, by the layer's name; ``None`` outside a mixture of experts."""
    found = _EXPERT.search(layer)
    return layer[: found.end() - 1] if found else None


def _as_it_is(weight: Tensor) -> Tensor:
    return weight


def _turned(weight: Tensor) -> Tensor:
    return weight.mT


ORIENTED_WEIGHT: Mapping[type[nn.Module], Callable[[Tensor], Tensor]] = {nn.Linear: _as_it_is, Conv1D: _turned}
"""How each layer type stores its weight: the weight ↦ a view of shape [d_out, d_in]."""


def oriented_weight(module: nn.Module) -> Tensor | None:
    """A [d_out, d_in] view of a module's weight, or ``None`` if it is not a floating-point linear map we know."""
    for kind, turned in ORIENTED_WEIGHT.items():
        if isinstance(module, kind):
            weight = turned(module.weight)  # type: ignore[arg-type]
            return weight if weight.dim() == 2 and weight.is_floating_point() else None
    return None


def fetched_weight(module: nn.Module) -> Tensor | None:
    """:func:`oriented_weight` with its numbers: a copy where they are offloaded."""
    weight = oriented_weight(module)
    if weight is None or not weight.is_meta:
        return weight
    turned = next(turned for kind, turned in ORIENTED_WEIGHT.items() if isinstance(module, kind))
    return turned(numbers_of(module))


def weight_of(model: nn.Module, layer: Layer) -> Tensor:
    """The layer's weight, [d_out, d_in]: a view of the model's own parameter, or a copy of one that is offloaded."""
    weight = fetched_weight(model.get_submodule(layer.name))
    if weight is None or tuple(weight.shape) != (layer.d_out, layer.d_in):
        raise ModelError(
            f"`{layer.name}` is not a {layer.d_out}×{layer.d_in} linear layer in this model",
            "the plan or the statistics belong to another model, or the layer is compressed already",
        )
    return weight


def select_layers(model: PreTrainedModel, choice: LayersConfig) -> dict[str, Layer]:
    """The linear layers of the decoder blocks, by qualified name.

    The output head and anything outside the blocks stay dense: they are what maps tokens to vectors and back. So do layers whose
    weight is used in several places.

    Args:
        model: any causal language model of transformers.
        choice: patterns to include and exclude.

    Raises:
        ModelError: nothing is left to compress.
    """
    head = model.get_output_embeddings()
    chosen, uses = {}, _uses(model)
    for name, module in model.named_modules():
        weight = oriented_weight(module)
        if weight is None or module is head or _is_shared(module, uses):
            continue
        layer = Layer(name, weight.shape[1], weight.shape[0], bias=getattr(module, "bias", None) is not None)
        if layer.block is not None and _matches(name, choice.include) and not _matches(name, choice.exclude):
            chosen[name] = layer
    if not chosen:
        raise ModelError(
            f"no layer to compress in {type(model).__name__} (include {list(choice.include)}, exclude {list(choice.exclude)})",
            "the patterns match qualified names such as `*.mlp.*`; a compressed checkpoint has no dense layers left",
        )
    return chosen


def _uses(model: nn.Module) -> Counter[int]:
    """In how many places each weight is used: one that is shared cannot be replaced in one of them."""
    weights = (module._parameters.get("weight") for _, module in model.named_modules(remove_duplicate=False))
    return Counter(id(weight) for weight in weights if weight is not None)


def _is_shared(module: nn.Module, uses: Counter[int]) -> bool:
    return uses[id(module._parameters.get("weight"))] > 1


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
