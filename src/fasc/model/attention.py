"""Attentions whose heads or value features may be fewer: their layers, and a forward pass with values of their own width.

Between the value projection and the output projection lies only a mean over positions, with the same weights for every feature
of a head. So any linear map of a value head may be moved from one to the other, and a head may have fewer value features than key
features. transformers' own code gives values the width of the keys; :func:`with_values_of` changes that and nothing else.
"""

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fasc.errors import ModelError
from fasc.model.coupling import Coupling, find_heads, inputs_of, separable
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer
from fasc.model.scopes import restored

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

_SAME = 1e-3
"""Relative difference up to which two inputs are the same, in any precision."""


@dataclass(frozen=True, slots=True)
class Attention:
    """The attention of a block."""

    coupling: Coupling
    """Its layers, joined by key-value heads with the query heads that each serves."""

    value: Layer | None
    """The value projection, where its features may be fewer."""

    @property
    def width(self) -> int:
        """Features of a value head; needs the value projection."""
        assert self.value is not None  # noqa: S101 - the caller has looked
        return self.value.d_out // self.coupling.parts


def find_attentions(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[Attention]:
    """The attentions whose key-value heads can go; whether value features can is tried by running them.

    Args:
        model: dense; comes out as it went in.
        groups: its input groups, in the order of the calls.
    """
    couplings = find_heads(model, groups)
    if not couplings:
        return []
    if couplings[0].parts > 1:
        consumers = inputs_of(model, [one.consumer.name for one in couplings])
        if not separable(model, couplings, consumers, _one_left_out):  # something else has an entry for each head
            return []
    values = [_value_of(one) for one in couplings]
    own = all(value is not None for value in values) and _runs_with_own_width(model, couplings)
    return [Attention(one, value if own else None) for one, value in zip(couplings, values, strict=True)]


def _one_left_out(coupling: Coupling) -> tuple[Mapping[str, Callable[..., Tensor]], Tensor]:
    """The last key-value head and its query heads are not there: what the others give must stay as it is."""

    def without(share: int) -> Callable[..., Tensor]:
        return lambda _module, _args, output: output[..., :-share]

    stay = torch.arange(coupling.consumer.d_in // coupling.parts * (coupling.parts - 1))
    return {layer.name: without(layer.d_out // coupling.parts) for layer in coupling.producers}, stay


def _value_of(coupling: Coupling) -> Layer | None:
    parent = coupling.consumer.name.rpartition(".")[0]
    expected = {f"{parent}.{name}" for name in _PROJECTIONS}
    if {layer.name for layer in coupling.layers} != expected:
        return None
    return next(layer for layer in coupling.producers if layer.kind == "v_proj")


def _runs_with_own_width(model: PreTrainedModel, couplings: Sequence[Coupling]) -> bool:
    """Whether this module's forward pass computes what the model's own does."""
    if not couplings:
        return False
    consumers = [one.consumer.name for one in couplings]
    before = inputs_of(model, consumers)
    with restored(model, [name.rpartition(".")[0] for name in consumers]):
        try:
            for coupling in couplings:
                with_values_of(model, coupling.consumer.name, coupling.consumer.d_in // _query_heads(coupling))
            now = inputs_of(model, consumers)
        except (ModelError, AttributeError, RuntimeError, TypeError, ValueError):  # built in another way
            return False
    return all(
        now[name].shape == before[name].shape and bool((now[name] - before[name]).abs().max() <= _SAME * before[name].abs().max())
        for name in consumers
    )


def _query_heads(coupling: Coupling) -> int:
    value = _value_of(coupling)
    assert value is not None  # noqa: S101 - the caller has looked
    return coupling.consumer.d_in // (value.d_out // coupling.parts)


def with_values_of(model: nn.Module, consumer: str, width: int) -> None:
    """Put an attention in the place of the one that holds a layer: the same modules, values of so many features a head.

    Args:
        model: changed in place; the old attention object stays as it was.
        consumer: qualified name of its output projection.
        width: features of a value head.

    Raises:
        ModelError: it is built in another way, or the model runs it with a kernel that takes one width only.
    """
    name = consumer.rpartition(".")[0]
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    new = copy.copy(old)
    new._modules = dict(old._modules)
    new.__class__ = _own_width_class(type(old))  # type: ignore[arg-type]
    setattr(new, "value_width", width)  # noqa: B010 - the class is made at run time
    implementation = str(getattr(getattr(old, "config", None), "_attn_implementation", None))
    if "flash" in implementation:
        raise ModelError(f"`{name}`: {implementation} takes values as wide as keys", 'load with attn_implementation="sdpa"')
    setattr(model.get_submodule(parent), leaf, new)


@cache
def _own_width_class(kind: type[nn.Module]) -> type[nn.Module]:
    """A class of attention modules with values of their own width.

    Raises:
        ModelError: its module lacks what such attentions are made of.
    """
    if issubclass(kind, _OwnWidth):
        return kind
    source = sys.modules[kind.__module__]
    rotate, eager = getattr(source, "apply_rotary_pos_emb", None), getattr(source, "eager_attention_forward", None)
    if rotate is None or eager is None:
        raise ModelError(f"a {kind.__name__} has no values of their own width", "leave `values` out of --layouts")
    parts = {"rotate": staticmethod(rotate), "eager": staticmethod(eager), "__doc__": kind.__doc__}
    return type(f"{kind.__name__}OwnWidth", (_OwnWidth, kind), parts)


class _OwnWidth(nn.Module):
    """The forward pass that Llama, Mistral, Qwen and Gemma share, with a view of the values of its own."""

    rotate: Callable[..., tuple[Tensor, Tensor]]
    eager: Callable[..., tuple[Tensor, Tensor | None]]
    value_width: int
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    config: Any
    scaling: float
    layer_idx: int

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """As the class below it, but for the width of a value head.

        Args:
            hidden_states: [sequences, positions, features].
            position_embeddings: cosine and sine.
            attention_mask: as transformers gives it.
            past_key_values: the cache.
            kwargs: for the attention kernel.
        """
        shape = hidden_states.shape[:-1]
        query, key = (
            self._normed(norm, getattr(self, name)(hidden_states).view(*shape, -1, self.head_dim)).transpose(1, 2)
            for name, norm in (("q_proj", "q_norm"), ("k_proj", "k_norm"))
        )
        value: Tensor = self.v_proj(hidden_states).view(*shape, -1, self.value_width).transpose(1, 2)
        query, key = self.rotate(query, key, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, self.eager)
        for name, attribute in (("sliding_window", "sliding_window"), ("softcap", "attn_logit_softcapping")):
            if getattr(self, attribute, None) is not None:
                kwargs[name] = getattr(self, attribute)
        dropout = float(getattr(self, "attention_dropout", 0.0)) if self.training else 0.0
        output, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.reshape(*shape, -1).contiguous()), weights

    def _normed(self, norm: str, heads: Tensor) -> Tensor:
        module = getattr(self, norm, None)
        return heads if module is None else module(heads)
