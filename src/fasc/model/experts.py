"""Mixtures of experts: each expert's projections as layers of their own, for the length of a ``with``.

transformers keeps the weights of all experts of a block in one tensor of three axes, which no hook on a layer sees. Here every
expert gets modules that read views of that tensor, and the block calls them one by one. No parameter is added or copied.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class ExpertLinear(nn.Linear):
    """One projection of one expert: a view of the fused weights, without parameters of its own."""

    def __init__(self, experts: nn.Module, projection: str, index: int) -> None:
        nn.Module.__init__(self)
        # A tuple hides the experts from nn.Module: they hold this module already.
        self._experts = (experts,)
        self._projection, self._index = projection, index
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """[d_out, d_in], a view."""
        experts = self._experts[0]
        fused: Tensor = getattr(experts, self._projection)[self._index]
        return fused.mT if experts.is_transposed else fused

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        """[d_out], a view, where the experts have biases."""
        experts = self._experts[0]
        return getattr(experts, f"{self._projection}_bias")[self._index] if experts.has_bias else None


class Expert(nn.Module):
    """The projections of one expert."""

    positions: Tensor | None = None
    """Which of the tokens of the batch it reads, int64 [its tokens], of the last call."""

    def __init__(self, experts: nn.Module, index: int) -> None:
        super().__init__()
        self.first = "gate_up_proj" if experts.has_gate else "up_proj"
        self.add_module(self.first, ExpertLinear(experts, self.first, index))
        self.add_module("down_proj", ExpertLinear(experts, "down_proj", index))


def is_fused(module: nn.Module) -> bool:
    """Whether a module holds the fused weights of several experts, as transformers writes them."""
    weight = getattr(module, "down_proj", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 3 and hasattr(module, "_apply_gate")


@contextmanager
def expert_layers(model: nn.Module) -> Iterator[list[str]]:
    """Let every expert's projections be layers of the model, named ``….experts.3.gate_up_proj`` and the like.

    Without fused experts nothing changes. The model is as it was afterwards.

    Yields:
        Names of the modules that hold experts.
    """
    fused = [(name, module) for name, module in model.named_modules() if is_fused(module)]
    for _, experts in fused:
        parts = [Expert(experts, index) for index in range(experts.down_proj.shape[0])]
        for index, part in enumerate(parts):
            experts.add_module(str(index), part)
        experts.forward = partial(_forward, experts, parts)
    try:
        yield [name for name, _ in fused]
    finally:
        for _, experts in fused:
            del experts.forward
            for index in range(experts.down_proj.shape[0]):
                delattr(experts, str(index))


def _forward(experts: Any, parts: Sequence[Expert], hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What the experts compute, one after the other.

    Args:
        experts: their module.
        parts: one for each.
        hidden_states: [tokens, d].
        top_k_index: [tokens, k], which experts a token goes to.
        top_k_weights: [tokens, k].
    """
    result = torch.zeros_like(hidden_states)
    for index, part in enumerate(parts):
        token, position = torch.where(top_k_index == index)
        part.positions = token
        if len(token) == 0 and torch.is_grad_enabled():
            continue  # without gradients it is called, so that the layers of an idle expert are seen as well
        inner = part.get_submodule(part.first)(hidden_states[token])
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        outputs = part.get_submodule("down_proj")(inner)
        if experts.has_post_expert_norm:
            outputs = experts.post_expert_norm(outputs)
        weighted = outputs * top_k_weights[token, position, None]
        result = result.index_add(0, token, weighted.to(result.dtype))
    return result
