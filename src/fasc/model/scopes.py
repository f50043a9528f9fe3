"""Change some layers of a model for a moment, and run it from the block where the change lies."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def restored(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Whatever the body puts in the place of these layers, the old modules stand there again afterwards."""
    old = {name: model.get_submodule(name) for name in layers}
    try:
        yield
    finally:
        for name, module in old.items():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module)


class TailRunner:
    """Runs a model on one batch from any block on, with the dense hidden states of the blocks below it.

    Args:
        model: dense, in evaluation mode.
        tokens: [batch, length], without padding.
        blocks: names of all blocks, in order.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, blocks: Sequence[str]) -> None:
        self._model, self._tokens, self._blocks = model, tokens, list(blocks)
        self._results: dict[str, Any] = {}

        def keep(name: str, _module: nn.Module, _args: Any, result: Any) -> None:
            self._results[name] = result

        with ExitStack() as stack, torch.no_grad():
            for name in self._blocks:
                stack.callback(model.get_submodule(name).register_forward_hook(partial(keep, name)).remove)
            self.logits: Tensor = model(input_ids=tokens, use_cache=False).logits
        """Of the dense model."""

    def logits_from(self, block: str | None) -> Tensor:
        """Logits of the model as it is now, if it differs from the dense one only from ``block`` on (``None``: anywhere)."""
        below = self._blocks[: self._blocks.index(block)] if block is not None else []
        with _answering(self._model, {name: self._results[name] for name in below}), torch.no_grad():
            logits: Tensor = self._model(input_ids=self._tokens, use_cache=False).logits
        return logits


@contextmanager
def _answering(model: nn.Module, results: Mapping[str, Any]) -> Iterator[None]:
    """These blocks give their stored results instead of running."""
    blocks = [(model.get_submodule(name), result) for name, result in results.items()]
    for block, result in blocks:
        block.forward = partial(_stored, result)
    try:
        yield
    finally:
        for block, _ in blocks:
            del block.forward


def _stored(result: Any, *_args: Any, **_kwargs: Any) -> Any:
    return result
