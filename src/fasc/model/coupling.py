"""Which layers of a block make the channels that another reads one by one: an MLP, found by running it with fewer.

Channels can be removed where each input feature of one layer depends on nothing but one output feature of each of the layers
before it: ``down(act(gate(x)) * up(x))``. Whether that is so depends on what lies in between (a norm over the channels mixes
them), so it is tried: the makers leave some of their outputs out, and what the reader is given must be what it was without those.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.model.groups import InputGroup, try_out
from fasc.model.layers import Layer

_SAME = 1e-3
"""Relative difference up to which two inputs are the same, in any precision."""

_NEAREST = 2
"""Groups before a reader that are tried."""

_MAKERS = 2
"""Where all layers of a fitting width are not the makers, so many of the last of them are tried, and fewer."""


@dataclass(frozen=True, slots=True)
class Channels:
    """The layers of one MLP, joined by their channels."""

    group: InputGroup
    """The group that the makers belong to; in a parallel block the attention's layers are in it too."""

    makers: tuple[Layer, ...]
    """Layers whose outputs are the channels, each once or several times one after the other (a fused ``gate_up``)."""

    reader: InputGroup
    """The one layer whose inputs are the channels."""

    @property
    def count(self) -> int:
        """How many channels there are."""
        return self.reader.d_in

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Makers and reader."""
        return (*self.makers, *self.reader.layers)

    @property
    def kind(self) -> tuple[str, ...]:
        """The kinds of the layers."""
        return tuple(layer.kind for layer in self.layers)


def rows_of(channels: Tensor, count: int, d_out: int) -> Tensor:
    """The outputs of a maker that belong to some channels: ``j``, ``j + count`` and so on."""
    starts = torch.arange(0, d_out, count, device=channels.device)
    return (starts[:, None] + channels).flatten()


def find_channels(model: PreTrainedModel, groups: Sequence[InputGroup]) -> list[Channels]:
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
    given = _given(model, [candidates[0].reader.name for candidates in left])
    found: list[Channels] = []
    while left:
        kinds: dict[tuple[str, ...], list[Channels]] = {}
        for candidates in left:
            kinds.setdefault(candidates[0].kind, []).append(candidates[0])
        alone = {kind for kind, ones in kinds.items() if _stand_alone(model, ones, given)}
        found += [candidates[0] for candidates in left if candidates[0].kind in alone]
        left = [candidates[1:] for candidates in left if candidates[0].kind not in alone and len(candidates) > 1]
    order = {group.name: position for position, group in enumerate(groups)}
    return sorted({one.group.name: one for one in found}.values(), key=lambda one: order[one.group.name])


def _candidates(groups: Sequence[InputGroup], position: int) -> list[Channels]:
    """What may make the channels that a group reads, the nearest first."""
    reader = groups[position]
    if len(reader.layers) > 1 or reader.block is None:
        return []
    fitting: list[tuple[InputGroup, tuple[Layer, ...]]] = []
    for group in reversed(groups[:position]):
        if group.block != reader.block or len(fitting) == _NEAREST:
            break
        makers = tuple(layer for layer in group.layers if layer.d_out % reader.d_in == 0)
        if makers:
            fitting.append((group, makers))
    return [
        Channels(group, makers[-count:], reader)
        for group, makers in fitting
        for count in (len(makers), *range(min(_MAKERS, len(makers) - 1), 0, -1))
    ]


def _given(model: PreTrainedModel, readers: Sequence[str]) -> dict[str, Tensor]:
    """What each reader is given by the model as it is."""
    found: dict[str, Tensor] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = args[0]

        return hook

    _run(model, {name: remember(name) for name in readers}, {})
    return found


def _stand_alone(model: PreTrainedModel, candidates: Sequence[Channels], given: Mapping[str, Tensor]) -> bool:
    """Whether every reader is given the same without the channels that the makers leave out."""
    same: dict[str, bool] = {}

    def compare(name: str, kept: Tensor) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            expected = given[name][..., kept]
            close = args[0].shape == expected.shape
            same[name] = close and bool((args[0] - expected).abs().max() <= _SAME * expected.abs().max())
            return (given[name], *args[1:])  # the layers after it read what they always read

        return hook

    checks, cuts = {}, {}
    for one in candidates:
        kept = _some(one.count).to(model.device)
        checks[one.reader.name] = compare(one.reader.name, kept)
        for layer in one.makers:
            cuts[layer.name] = _leaving_out(rows_of(kept, one.count, layer.d_out))
    try:
        _run(model, checks, cuts)
    except (RuntimeError, ValueError, IndexError, AssertionError):  # shapes that do not fit together: no channels
        return False
    return all(same.get(name, False) for name in checks)


def _leaving_out(rows: Tensor) -> Callable[..., Tensor]:
    def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        return output[..., rows]

    return hook


def _some(count: int) -> Tensor:
    """About half of the channels, spread so that they are no whole heads or halves."""
    chosen = torch.rand(count, generator=torch.Generator().manual_seed(0)) < 0.5
    chosen[:2] = torch.tensor([True, False])[:count]
    return chosen.nonzero().flatten()


def _run(model: PreTrainedModel, before: Mapping[str, Callable[..., Any]], after: Mapping[str, Callable[..., Any]]) -> None:
    with ExitStack() as stack:
        for name, hook in before.items():
            stack.callback(model.get_submodule(name).register_forward_pre_hook(hook).remove)
        for name, hook in after.items():
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        try_out(model)
