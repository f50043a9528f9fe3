"""Run a model block by block, whatever its architecture: what each block is called with is seen, not assumed."""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.errors import ModelError

_BLOCK = re.compile(r"^(.*?\.)??\d+(?=\.)")

Arguments = Mapping[str, Any]

SAME = 1e-3
"""Relative difference up to which two hidden states are the same, in any precision."""


_WHOLE = "leave --block-replay and --propagate out: they run the model block by block"


def block_names(model: nn.Module, layers: Iterable[str]) -> list[str]:
    """Names of the blocks that hold these layers, in order: a block is where the first index of a name is."""
    found = {match.group(0) for layer in layers if (match := _BLOCK.match(layer))}
    order = {name: position for position, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda name: order[name])


@dataclass(frozen=True)
class BlockInputs:
    """What the first block reads, and what every block is given besides."""

    hidden: Sequence[Tensor]
    """Hidden states before the first block, [batch, length, d], batch by batch."""

    arguments: Mapping[tuple[str, tuple[int, ...]], Arguments]
    """By block and shape of the hidden states."""

    def rest(self, block: str, hidden: Tensor) -> Arguments:
        """The other arguments of a block, for hidden states of that shape."""
        return self.arguments[block, tuple(hidden.shape)]


class _Stop(Exception):  # noqa: N818 - no error: what was asked for has been seen
    pass


def block_inputs(model: PreTrainedModel, batches: Sequence[Tensor], names: Sequence[str]) -> BlockInputs:
    """See what the blocks are called with: for one batch of each shape a whole forward pass, for the others up to block one.

    Args:
        model: in evaluation mode.
        batches: tokens without padding, [batch, length].
        names: the blocks, in order.

    Raises:
        ModelError: the blocks, run one after the other, do not give what the model gives.
    """
    hidden: list[Tensor] = []
    arguments: dict[tuple[str, tuple[int, ...]], Arguments] = {}
    seen: set[tuple[int, ...]] = set()
    for batch in batches:
        first = tuple(batch.shape) not in seen
        seen.add(tuple(batch.shape))
        states = _watch(model, batch, names if first else names[:1], arguments, stop=not first)
        hidden.append(states[0])
        if first:
            _check(model, names, states, arguments)
    return BlockInputs(hidden, arguments)


def _watch(
    model: PreTrainedModel,
    batch: Tensor,
    names: Sequence[str],
    arguments: dict[tuple[str, tuple[int, ...]], Arguments],
    *,
    stop: bool,
) -> list[Tensor]:
    states: list[Tensor] = []

    def hook(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state, rest = taken(args, kwargs)
        states.append(state)
        arguments[name, tuple(state.shape)] = rest
        if stop:
            raise _Stop

    with ExitStack() as stack, torch.no_grad():
        for name in names:
            handle = model.get_submodule(name).register_forward_pre_hook(partial(hook, name), with_kwargs=True)
            stack.callback(handle.remove)
        with suppress(_Stop):
            model(input_ids=batch, use_cache=False)
    return states


def _check(
    model: PreTrainedModel,
    names: Sequence[str],
    states: Sequence[Tensor],
    arguments: Mapping[tuple[str, tuple[int, ...]], Arguments],
) -> None:
    """The blocks one by one must give what the model gives."""
    if len(states) != len(names):
        raise ModelError(f"{type(model).__name__} calls its blocks {len(states)} times for {len(names)}", "leave --propagate out")
    for name, before, after in zip(names, states, states[1:], strict=False):
        given = run_block(model.get_submodule(name), before, arguments[name, tuple(before.shape)])
        if given.shape != after.shape or float((given - after).abs().max()) > SAME * float(after.abs().max()):
            raise ModelError(
                f"`{name}` of {type(model).__name__}, run alone, does not give what the next block reads", "leave --propagate out"
            )


def taken(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Arguments]:
    """The hidden states that a block is called with, by place or by name, and its other arguments.

    Raises:
        ModelError: it is called with something else.
    """
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a block is called with {_kind(hidden)} in the place of hidden states", _WHOLE)
    return hidden, {"args": args[1:], "kwargs": {key: value for key, value in kwargs.items() if args or key != "hidden_states"}}


def returned(output: Any) -> Tensor:
    """The hidden states that a block gives, alone or first of several.

    Raises:
        ModelError: it gives something else.
    """
    hidden = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(hidden, Tensor):
        raise ModelError(f"a block gives {_kind(output)} in the place of hidden states", _WHOLE)
    return hidden


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def run_block(block: nn.Module, hidden: Tensor, given: Arguments) -> Tensor:
    """Hidden states after a block; no gradient is kept for them."""
    with torch.no_grad():
        return call_block(block, hidden, given)


def call_block(block: nn.Module, hidden: Tensor, given: Arguments) -> Tensor:
    """Hidden states after a block."""
    return returned(block(hidden, *given["args"], **given["kwargs"]))


@contextmanager
def leaving_after(module: nn.Module) -> Iterator[None]:
    """The body runs a model as far as the end of a module and is left there."""

    def stop(*_: Any) -> None:
        raise _Stop

    handle = module.register_forward_hook(stop)
    try:
        with suppress(_Stop):
            yield
    finally:
        handle.remove()


def taken_by(block: nn.Module, run: Callable[[], object]) -> Tensor:
    """The hidden states that a block is called with when the model runs, which is left as soon as they are known."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(taken(args, kwargs)[0])
        raise _Stop

    handle = block.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with suppress(_Stop):
            run()
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def stopping_after(model: nn.Module, blocks: Sequence[str], last: Sequence[str]) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Run a model only as far as some of its blocks, where nothing that comes after them is asked for.

    The first run goes to the end and is watched: where a block is called several times, or one of the others before the last of
    these, all runs go to the end.

    Args:
        model: calls its blocks one after the other.
        blocks: all of them.
        last: those that must have run.

    Yields:
        What calls a function that runs the model.
    """
    calls: list[str] = []
    end: str | None = None

    def hook(name: str, *_: Any) -> None:
        if name == end:
            raise _Stop
        if not watched:
            calls.append(name)

    watched = False

    def run(forward: Callable[[], Any]) -> None:
        nonlocal watched, end
        with suppress(_Stop):
            forward()
        if not watched:
            watched = True
            rest = calls[max((place for place, name in enumerate(calls) if name in last), default=len(calls)) + 1 :]
            end = rest[0] if rest and len(set(calls)) == len(calls) else None

    with ExitStack() as stack:
        for name in blocks:
            stack.callback(model.get_submodule(name).register_forward_pre_hook(partial(hook, name)).remove)
        yield run


def input_of(block: nn.Module, layer: str, run: Callable[[], Tensor]) -> Tensor:
    """What a layer is given when the block runs; the block is left as soon as it is known."""
    return taken_by(block.get_submodule(layer), run)
