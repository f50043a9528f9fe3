"""Who produces what nobody else reads: the channels of an MLP, the heads of an attention.

Parts can be removed where each input feature of one layer, the consumer, depends on nothing but some output features of the
layers before it, the producers: ``down(act(gate(x)) * up(x))``. Whether that is so depends on what lies in between (a norm over
the channels mixes them), so it is tried: the producers leave some of their outputs out, and what the consumer is given must be
what it was without those.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from fasc.model.groups import InputGroup, try_out
from fasc.model.layers import Layer

Part = Literal["channels", "heads"]

_SAME = 1e-3
"""Relative difference up to which two inputs are the same, in any precision."""

_NEAREST = 2
"""Groups before a consumer that are tried."""

_PRODUCERS = 2
"""Where all layers of a fitting width are not the producers, so many of the last of them are tried, and fewer."""


@dataclass(frozen=True, slots=True)
class Coupling:
    """Layers joined by parts that only they share: the MLP of a block by its channels, the attention by its key-value heads."""

    part: Part
    parts: int
    """Channels, or key-value heads with the query heads that each serves."""

    group: InputGroup
    """The group that the producers belong to; in a parallel block the attention's and the MLP's layers are both in it."""

    producers: tuple[Layer, ...]
    """Their outputs are the parts, each once or several times one after the other (a fused ``gate_up``)."""

    consumer: InputGroup
    """The one layer whose inputs are the parts."""

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Producers and consumer."""
        return (*self.producers, *self.consumer.layers)

    @property
    def kind(self) -> tuple[str, ...]:
        """The kinds of the layers."""
        return tuple(layer.kind for layer in self.layers)

    def parameters(self, count: int) -> int:
        """Weights and biases of its layers with so many parts left, without the bias that a refitted consumer may gain."""
        rows = sum(count * (layer.d_out // self.parts) * (layer.d_in + layer.bias) for layer in self.producers)
        consumer = self.consumer.layers[0]
        return rows + count * (consumer.d_in // self.parts) * consumer.d_out + consumer.bias * consumer.d_out


def rows_of(channels: Tensor, count: int, d_out: int) -> Tensor:
    """The outputs of a producer that belong to some channels: ``j``, ``j + count`` and so on."""
    starts = torch.arange(0, d_out, count, device=channels.device)
    return (starts[:, None] + channels).flatten()


def find_channels(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[Coupling]:
    """The MLPs whose channels stand each by itself, in the order of the groups; none where no block is built so.

    Candidates are a group of one layer and the nearest group before it in the same block with layers whose outputs are
    as wide as what that layer reads, or a multiple of it. In a parallel block the layers of the attention are in the
    same group, and some may be so wide by chance; its output layer may lie in between. Where a candidate is not it, the
    next is tried: without the first layers of the group, then the next nearest group. Those of one kind are tried
    together.

    Args:
        model: dense; comes out as it went in.
        groups: its input groups, in the order of the calls.
    """
    left = [candidates for candidates in (_candidates(groups, position) for position in range(len(groups))) if candidates]
    inputs = inputs_of(model, [candidates[0].consumer.name for candidates in left])
    couplings: list[Coupling] = []
    while left:
        kinds: dict[tuple[str, ...], list[Coupling]] = {}
        for candidates in left:
            kinds.setdefault(candidates[0].kind, []).append(candidates[0])
        apart = {kind for kind, ones in kinds.items() if separable(model, ones, inputs, _half_of_the_channels)}
        couplings += [candidates[0] for candidates in left if candidates[0].kind in apart]
        left = [candidates[1:] for candidates in left if candidates[0].kind not in apart and len(candidates) > 1]
    order = {group.name: position for position, group in enumerate(groups)}
    return _apart(sorted({one.group.name: one for one in couplings}.values(), key=lambda one: order[one.group.name]))


def most_channels(groups: Sequence[InputGroup]) -> int:
    """How many channels the widest MLP may have, by the widths of the layers alone; nothing is tried.

    Args:
        groups: input groups, in the order of the calls.
    """
    return max((one.parts for position in range(len(groups)) for one in _candidates(groups, position)), default=0)


def _apart(couplings: Sequence[Coupling]) -> list[Coupling]:
    """Without those that begin where the one before ends: a layer loses its rows or its columns, not both."""
    taken: set[str] = set()
    apart = []
    for one in couplings:
        names = {layer.name for layer in one.layers}
        if taken.isdisjoint(names):
            apart.append(one)
            taken |= names
    return apart


def head_sizes(config: PretrainedConfig) -> tuple[int, int, int]:
    """Query heads, key-value heads, and features of each."""
    heads = config.num_attention_heads
    keys = getattr(config, "num_key_value_heads", None) or heads
    return heads, keys, getattr(config, "head_dim", None) or config.hidden_size // heads


def find_heads(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[Coupling]:
    """The attentions whose key-value heads can go with the query heads that they serve; none where none is built so.

    Separate query, key and value projections are recognised by their widths in the model's config. That a key-value head serves
    the query heads in consecutive rows, and no others, is tried.

    Args:
        model: dense; comes out as it went in.
        groups: its input groups, in the order of the calls.
    """
    heads, keys, width = head_sizes(model.config.get_text_config())
    widths = sorted([heads * width, keys * width, keys * width])
    couplings = []
    for index, group in enumerate(groups):
        consumer = next((one for one in groups[index + 1 :] if one.block == group.block), None)
        fits = consumer is not None and len(consumer.layers) == 1 and consumer.d_in == heads * width
        if consumer is not None and fits and sorted(layer.d_out for layer in group.layers) == widths:
            couplings.append(Coupling("heads", keys, group, group.layers, consumer))
    if not couplings or keys == 1:  # a single head cannot go
        return couplings
    inputs = inputs_of(model, [one.consumer.name for one in couplings])
    return couplings if separable(model, couplings, inputs, _one_head_less) else []


def _candidates(groups: Sequence[InputGroup], position: int) -> list[Coupling]:
    """What may produce the channels that a group reads, the nearest first."""
    consumer = groups[position]
    if len(consumer.layers) > 1 or consumer.block is None:
        return []
    fitting: list[tuple[InputGroup, tuple[Layer, ...]]] = []
    for group in reversed(groups[:position]):
        if group.block != consumer.block or len(fitting) == _NEAREST:
            break
        producers = tuple(layer for layer in group.layers if layer.d_out % consumer.d_in == 0)
        if producers:
            fitting.append((group, producers))
    return [
        Coupling("channels", consumer.d_in, group, producers[-count:], consumer)
        for group, producers in fitting
        for count in (len(producers), *range(min(_PRODUCERS, len(producers) - 1), 0, -1))
    ]


def inputs_of(model: PreTrainedModel, consumers: Sequence[str]) -> dict[str, Tensor]:
    """What each consumer is given by the model as it is."""
    inputs: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name] = args[0]

        return hook

    _run(model, {name: remember(name) for name in consumers}, {})
    return inputs


Change = Callable[[Coupling], tuple[Mapping[str, Callable[..., Tensor]], Tensor]]
"""Coupling → what its producers do to their outputs, and which inputs the consumer shall still have unchanged."""


def _half_of_the_channels(coupling: Coupling) -> tuple[Mapping[str, Callable[..., Tensor]], Tensor]:
    """About half of the channels are left out, spread so that they are no whole heads or halves."""
    chosen = torch.rand(coupling.parts, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen[:2] = torch.tensor([True, False])[: coupling.parts]
    stay = chosen.nonzero().flatten()

    def leaving_out(rows: Tensor) -> Callable[..., Tensor]:
        return lambda _module, _args, output: output[..., rows.to(output.device)]

    return {layer.name: leaving_out(rows_of(stay, coupling.parts, layer.d_out)) for layer in coupling.producers}, stay


def _one_head_less(coupling: Coupling) -> tuple[Mapping[str, Callable[..., Tensor]], Tensor]:
    """The last key-value head and its query heads say nothing: what the others give must stay as it is."""

    def silencing(share: int) -> Callable[..., Tensor]:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            changed = output.clone()
            changed[..., -share:] = 0
            return changed

        return hook

    stay = torch.arange(coupling.consumer.d_in // coupling.parts * (coupling.parts - 1))
    return {layer.name: silencing(layer.d_out // coupling.parts) for layer in coupling.producers}, stay


def separable(model: PreTrainedModel, candidates: Sequence[Coupling], inputs: Mapping[str, Tensor], change: Change) -> bool:
    """Whether every consumer is given the same where the producers' change must not be seen.

    An expert that hears none of the few tokens says nothing; it is built as the others are.
    """
    same: dict[str, bool] = {}
    idle = {one.consumer.name for one in candidates if one.consumer.name in inputs and not inputs[one.consumer.name].numel()}

    def compare(name: str, stay: Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if name in idle:
                return (inputs[name], *args[1:])
            expected = inputs[name][..., stay.to(inputs[name].device)]
            now = args[0] if args[0].shape == expected.shape else args[0][..., : len(stay)]
            whole = args[0].shape in (expected.shape, inputs[name].shape)
            same[name] = whole and bool((now - expected).abs().max() <= _SAME * expected.abs().max())
            return (inputs[name], *args[1:])  # the layers after it read what they always read

        return hook

    checks: dict[str, Callable[..., Any]] = {}
    changes: dict[str, Callable[..., Tensor]] = {}
    for one in candidates:
        hooks, stay = change(one)
        checks[one.consumer.name] = compare(one.consumer.name, stay)
        changes |= hooks
    try:
        _run(model, checks, changes)
    except (RuntimeError, ValueError, IndexError, AssertionError):  # shapes that do not fit together: not separable
        return False
    return len(idle) < len(candidates) and all(same.get(name, False) for name in checks.keys() - idle)


def _run(model: PreTrainedModel, before: Mapping[str, Callable[..., Any]], after: Mapping[str, Callable[..., Any]]) -> None:
    with ExitStack() as stack:
        for name, hook in before.items():
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for name, hook in after.items():
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        try_out(model)
