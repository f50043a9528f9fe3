"""Input groups: the layers that read the same tensor, found by running the model once."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.errors import ModelError
from fasc.model.layers import Layer, fetched_weight, select_layers, weight_of
from fasc.model.offload import numbers_of
from fasc.model.options import LayersConfig
from fasc.model.scopes import evaluating

Scope = Literal["group", "layer"]
"""``group``: all layers that read one tensor, together. ``layer``: each by itself."""


class _Stack:
    """Layers that read one input, their outputs one after the other."""

    __slots__ = ()
    layers: tuple[Layer, ...]

    @property
    def d_in(self) -> int:
        """Features of the shared input."""
        return self.layers[0].d_in

    @property
    def d_out(self) -> int:
        """Output features of all layers together."""
        return sum(layer.d_out for layer in self.layers)

    @property
    def parameters(self) -> int:
        """Of the dense layers, biases included."""
        return sum(layer.parameters for layer in self.layers)


@dataclass(frozen=True, slots=True)
class InputGroup(_Stack):
    """Layers that read the same tensor (q/k/v; gate/up). They have one ``x``, and their ``g`` is the sum over members."""

    layers: tuple[Layer, ...]
    """In the order in which the model calls them."""

    @property
    def name(self) -> str:
        """The layer's own name, or ``parent.a+b+c`` for several."""
        return group_name([layer.name for layer in self.layers])

    @property
    def block(self) -> int | None:
        """Decoder block, see :attr:`Layer.block`."""
        return self.layers[0].block

    @property
    def kind(self) -> str:
        """The members' kinds, joined: ``q_proj+k_proj+v_proj``."""
        return "+".join(layer.kind for layer in self.layers)

    def units(self, scope: Scope) -> list["Unit"]:
        """The layers as one unit, or each by itself."""
        return [self.unit()] if scope == "group" else [Unit(self.name, (layer,)) for layer in self.layers]

    def unit(self) -> "Unit":
        """All layers as one unit."""
        return Unit(self.name, self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"layers": [layer.to_dict() for layer in self.layers]}

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "InputGroup":
        """Inverse of :meth:`to_dict`."""
        return InputGroup(tuple(Layer(**layer) for layer in raw["layers"]))


@dataclass(frozen=True, slots=True)
class Unit(_Stack):
    """Layers of one group that share one decomposition: all of them, or one."""

    group: str
    """Name of the input group."""

    layers: tuple[Layer, ...]

    @property
    def name(self) -> str:
        """The layer's name, or the group's for several layers."""
        return self.layers[0].name if len(self.layers) == 1 else self.group

    @property
    def biases(self) -> int:
        """Bias entries that the dense layers have."""
        return sum(layer.d_out for layer in self.layers if layer.bias)

    @property
    def full_rank(self) -> int:
        """``d_in`` of a shared projector, ``min(d_in, d_out)`` of a layer: the whole of the rank fraction."""
        return self.d_in if len(self.layers) > 1 else min(self.d_in, self.d_out)

    @property
    def scope(self) -> Scope:
        """Whether the unit is a whole group of several layers, or one layer."""
        return "group" if len(self.layers) > 1 else "layer"


def stacked_weight(model: nn.Module, unit: Unit) -> Tensor:
    """The weights of a unit's layers one below the other, [Σ d_out, d_in], float64.

    Raises:
        ModelError: a layer is missing, of another shape, or compressed already.
    """
    return torch.cat([weight_of(model, layer).detach().double() for layer in unit.layers])


def group_name(names: list[str]) -> str:
    """``a.b.q`` for one layer; ``a.b.q+k+v`` for several, with the longest common parent written once."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    shared = 0
    while all(len(p) > shared + 1 and p[shared] == parts[0][shared] for p in parts):
        shared += 1
    return ".".join([*parts[0][:shared], "+".join(".".join(p[shared:]) for p in parts)])


_SAME = 1e-2
"""Relative difference up to which an output is that of a linear map, in any precision."""


class _Probe:
    """Records which tensor each layer read, and whether its output is ``x Wᵀ + b``.

    It holds the tensors, so that no address is used twice.
    """

    def __init__(self) -> None:
        self.read: dict[str, list[tuple[Any, ...]]] = {}
        self.not_linear: set[str] = set()
        self._held: list[Tensor] = []

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A subclass of ``nn.Linear`` may compute something else: a router that returns a tuple, a grouped product."""
        x, weight = args[0] if args else None, fetched_weight(module)
        if not isinstance(x, Tensor) or not isinstance(output, Tensor) or weight is None or x.shape[-1] != weight.shape[1]:
            self.not_linear.add(name)
            return
        bias = None if getattr(module, "bias", None) is None else numbers_of(module, "bias")
        expected = nn.functional.linear(x.to(weight), weight, bias)
        if expected.shape != output.shape or not (output.is_meta or _near(output, expected)):
            self.not_linear.add(name)

    def enter(self, name: str, _module: nn.Module, args: tuple[Any, ...]) -> None:
        """Note the identity of what the layer reads."""
        x = args[0] if args else None
        if not isinstance(x, Tensor):
            self.not_linear.add(name)
            return
        self._held.append(x)
        storage = x.untyped_storage().data_ptr() or id(x)  # tensors without entries have no address
        identity = (storage, x.storage_offset(), tuple(x.shape), x.stride(), x._version)
        self.read.setdefault(name, []).append(identity)


def _near(output: Tensor, expected: Tensor) -> bool:
    if not output.numel():
        return True
    return bool((output.float() - expected.float()).abs().max() <= _SAME * expected.float().abs().max() + 1e-6)


def find_groups(model: PreTrainedModel, choice: LayersConfig) -> list[InputGroup]:
    """Run the model once on a few tokens and group the layers that read the same tensor.

    Layers that are not called (an expert without tokens, a tower of another modality) or do not compute ``x Wᵀ + b`` belong to no
    group and stay dense.

    Args:
        model: any causal language model of transformers; comes out as it went in. One on the meta device, whose layers hold no
            numbers, is taken at its word that they are linear.
        choice: patterns to include and exclude.

    Returns:
        The groups in the order in which the model calls them.

    Raises:
        ModelError: no layer matches, or none of those that do is called.
    """
    layers = select_layers(model, choice)
    probe = _Probe()
    with ExitStack() as stack:
        for name in layers:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(partial(probe.enter, name)).remove)
            stack.callback(module.register_forward_hook(partial(probe.leave, name)).remove)
        try_out(model)
    members: dict[tuple[Any, ...], list[Layer]] = {}
    for name, identities in probe.read.items():
        if name not in probe.not_linear:
            members.setdefault(tuple(identities), []).append(layers[name])
    if not members:
        raise ModelError(f"{type(model).__name__} calls none of the {len(layers)} chosen layers", "check --include")
    return [InputGroup(tuple(group)) for group in members.values()]


def try_out(model: PreTrainedModel) -> None:
    """Run the model on a few tokens, for the hooks that listen."""
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(8, device=model.device).remainder(vocabulary)[None]
    given = {"attention_mask": torch.ones_like(tokens)} if tokens.is_meta else {}  # otherwise transformers looks at positions
    with evaluating(model), torch.no_grad():
        model(input_ids=tokens, use_cache=False, **given)
