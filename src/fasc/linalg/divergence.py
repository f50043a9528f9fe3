"""The Kullback–Leibler divergence between two models' next-token distributions: the only one of the project."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def kl_divergence(
    logits: Float[Tensor, "*tokens vocabulary"], reference: Float[Tensor, "*tokens vocabulary"]
) -> Float[Tensor, "*tokens"]:
    """``KL(softmax(reference) ‖ softmax(logits))`` of every token, in nats.

    To measure, call it under ``torch.no_grad()``; to train, minimise its mean: it has a gradient for ``logits``.

    Args:
        logits: of the model that is measured or trained, in any precision.
        reference: of the model that it is compared with, on the same device; gets no gradient.

    Returns:
        In float32 (float64 if the logits are), with a first derivative only.
    """
    value: Tensor = _Divergence.apply(logits.flatten(0, -2), reference.flatten(0, -2))
    return value.view(logits.shape[:-1])


class _Divergence(torch.autograd.Function):
    """The values and their gradient ``q − p``, a few tokens at a time.

    Autograd would keep six matrices of tokens × vocabulary. Writing and reading them takes longer than half of the matrix
    products of a training step (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        precision = torch.promote_types(logits.dtype, torch.float32)
        tokens = max(1, _ENTRIES // logits.shape[1])
        values = []
        for start in range(0, logits.shape[0], tokens):
            chunk = slice(start, start + tokens)
            log_q = F.log_softmax(logits[chunk], dim=-1, dtype=precision)
            log_p = F.log_softmax(reference[chunk], dim=-1, dtype=precision)
            p = log_p.exp()
            values.append(log_p.sub_(log_q).mul_(p).sum(-1))
            if gradient is not None:
                gradient[chunk] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[:, None].to(gradient), None


_ENTRIES = 2**21
"""Logits that are looked at together: few enough to stay in a processor's cache, many enough to keep a GPU busy."""
