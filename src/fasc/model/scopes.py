"""Change a model for the length of a ``with``: its modes, what is trainable, its modules.

Afterwards everything is as it was before, also when the body raises.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from torch import nn


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode is put back."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen(model: nn.Module, except_: Sequence[nn.Module] = ()) -> Iterator[None]:
    """No parameter is trainable but those of some modules; every ``requires_grad`` and ``.grad`` is put back.

    Args:
        model: its parameters have no gradient when the body begins.
        except_: parts of the model whose parameters are trainable, whatever they were before.
    """
    before = [(name, parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()]
    try:
        for parameter in model.parameters():
            parameter.requires_grad = False
            parameter.grad = None
        for parameter in chain.from_iterable(module.parameters() for module in except_):
            parameter.requires_grad = True
        yield
    finally:
        now = dict(model.named_parameters())  # one that is offloaded is another object each time it was fetched
        for name, trainable, gradient in before:
            parameter = now[name]
            parameter.requires_grad = trainable
            parameter.grad = gradient


@contextmanager
def restored(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Whatever the body puts in the place of these layers, the old modules stand there again afterwards.

    Args:
        model: holds the layers.
        layers: qualified names.
    """
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in layers]
    modules = [parent.get_submodule(leaf) for parent, leaf in places]
    try:
        yield
    finally:
        for (parent, leaf), module in zip(places, modules, strict=True):
            setattr(parent, leaf, module)


@contextmanager
def forwarding(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Calling the module runs ``forward``; hooks of the module run as usual.

    A ``forward`` that somebody else has set on the module, as accelerate does for ``device_map``, is put back.
    """
    own = "forward" in vars(module)
    before = module.forward
    module.forward = forward
    try:
        yield
    finally:
        if own:
            module.forward = before
        else:
            del module.forward
