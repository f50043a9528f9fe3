"""The scalar whose gradient is measured: the summed negative log-likelihood, in nats."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fasc.provenance import digest
from fasc.statistics.options import Labels


def summed_nll(logits: Tensor, tokens: Tensor, mask: Tensor | None, labels: Labels, seeds: Sequence[int] = ()) -> Tensor:
    """``L``: the sum (never the mean) of token losses, so that the scale of a gradient does not depend on the batch.

    Args:
        logits: [batch, length, vocabulary].
        tokens: [batch, length].
        mask: 1 where there is text, [batch, length]; ``None`` means everywhere.
        labels: ``corpus``: position t is scored on token t+1 (the empirical Fisher, what the paper uses). ``sampled``:
            every position is scored on a token drawn from the model's own distribution (the true Fisher).
        seeds: of the draw, one for each sequence (:func:`label_seed`), so that its labels depend neither on the batch it is in
            nor on the process that reads it.

    Returns:
        A scalar, float32 or better.
    """
    if labels == "sampled":
        scored = torch.ones_like(tokens) if mask is None else mask
        targets = _draw(logits.detach(), seeds)
    else:
        logits = logits[:, :-1]
        targets = tokens[:, 1:]
        scored = torch.ones_like(targets) if mask is None else mask[:, 1:] * mask[:, :-1]
    targets = targets.masked_fill(scored == 0, -100)
    precision = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.flatten(0, 1).to(precision), targets.flatten(), reduction="sum")


def label_seed(seed: int, sequence: int) -> int:
    """The seed of the labels of one sequence.

    Args:
        seed: of the calibration.
        sequence: its place in the draw of sequences, those that were passed over included.
    """
    return int(digest([f"{seed}/{sequence}".encode()])[:16], 16)


def _draw(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """One token per position from softmax(logits), by the Gumbel-max identity."""
    generator = torch.Generator(logits.device)
    drawn = []
    for one, seed in zip(logits, seeds, strict=True):
        noise = torch.empty_like(one, dtype=torch.float32).exponential_(generator=generator.manual_seed(seed))
        drawn.append((one.float() - noise.log_()).argmax(-1))
    return torch.stack(drawn)
