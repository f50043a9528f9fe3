"""Run a model on one batch again and again, each time only from the block where it differs from the dense model."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.model.scopes import forwarding


class TailRunner:
    """Runs a model on one batch from any block on; the blocks below answer with what they gave in the dense model.

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
        with ExitStack() as stack, torch.no_grad():
            for name in below:
                stack.enter_context(forwarding(self._model.get_submodule(name), partial(_stored, self._results[name])))
            logits: Tensor = self._model(input_ids=self._tokens, use_cache=False).logits
        return logits


def _stored(result: Any, *_args: Any, **_kwargs: Any) -> Any:
    return result
