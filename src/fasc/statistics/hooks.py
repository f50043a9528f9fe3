"""Inputs and gradients of the layers of every group, for the length of a ``with``."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from fasc.model.experts import Expert
from fasc.statistics.capture import Call, GroupCapture


@contextmanager
def capturing(model: nn.Module, captures: Sequence[GroupCapture]) -> Iterator[None]:
    """Let every group listen while the context is open; only our own hooks are removed, also when the body raises."""
    with ExitStack() as stack:
        for capture in captures:
            name = capture.group.layers[0].name
            parent = model.get_submodule(name.rpartition(".")[0])
            expert = parent if isinstance(parent, Expert) else None
            first = model.get_submodule(name)
            stack.callback(first.register_forward_pre_hook(partial(capture.on_input, expert)).remove)
            if capture.wants_gradients:
                for layer in capture.group.layers:
                    module = model.get_submodule(layer.name)
                    begin, tell = partial(capture.call, expert), partial(capture.on_gradient, layer.name)
                    for remove in _on_gradients(module, begin, tell):
                        stack.callback(remove)
        yield


def _on_gradients(
    module: nn.Module, begin: Callable[[Tensor], Call], tell: Callable[[Call, Tensor, Tensor], None]
) -> list[Callable[[], None]]:
    """Call ``tell(call, ∂L/∂input, ∂L/∂output)`` in the backward pass of every call of a module; returns what ends that.

    A gradient comes with the call that it belongs to: of several calls, some may have none (an expert that is masked).

    Hooks of tensors, not torch's backward hook of a module: that one hands out a view which nobody may change in place, and a
    block may add its attention to what the module returned (Falcon).
    """
    calls: list[list[Tensor] | None] = []

    def enter(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not (args[0].requires_grad and torch.is_grad_enabled()):
            calls.append(None)
            return None
        call = begin(args[0])
        own = args[0].view_as(args[0])  # its gradient is that of this consumer alone
        of_output: list[Tensor] = []
        calls.append(of_output)
        own.register_hook(lambda of_input: tell(call, of_input, of_output.pop()))
        return (own, *args[1:])

    def leave(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        of_output = calls.pop()
        if of_output is not None and output.requires_grad:
            output.register_hook(of_output.append)

    return [module.register_forward_pre_hook(enter).remove, module.register_forward_hook(leave).remove]
