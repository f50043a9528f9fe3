"""Recovery: the layers of a compressed model are trained to say what the dense model says.

Compressing layer by layer adds up errors that no layer can see. A short distillation can: the layers that compression replaced
(nothing else) minimise the KL divergence of its next-token distribution from the dense model's on unlabelled text.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.compression.distillation import distil, divergence, rows_of
from fasc.compression.options import RecoveryConfig
from fasc.errors import ModelError, NonFiniteError, UsageError
from fasc.progress import progress


class Recovered(NamedTuple):
    """What recovery did. Divergences are KL(dense ‖ compressed) in nats per token."""

    before: float
    """On the held-out sequences, of the model as it was."""

    after: float
    """On the same ones, of the model as it is now; never more than ``before``."""

    share: float
    """How far the weights went from where they were to where training ended, 0 to 1."""

    held_out: int
    """Tokens of the held-out sequences."""

    losses: tuple[float, ...]
    """Of each step's batch, before the step."""


def recover(
    model: PreTrainedModel, dense: PreTrainedModel, tokens: Tensor, config: RecoveryConfig, work: Path | None = None
) -> Recovered:
    """Train the replaced layers of a compressed model towards the dense model's distributions, in place.

    Minimises ``KL(dense ‖ compressed)`` over the next token, in nats, by AdamW with a warm-up and a cosine decay to zero, in one
    pass over all but the last sixteenth of the sequences, in an order drawn by the seed. Everything else of the model stays as it
    is. The last sixteenth then says how far to go from the old weights towards the new ones (interpolation: arXiv:2109.01903):
    a short training on little text ends beyond its best point, and one at too high a rate far beyond, where it does harm. Both
    copies of the trained weights lie in the CPU's memory meanwhile.

    Args:
        model: compressed; weights in float32, because steps are smaller than what bfloat16 resolves.
        dense: what it was compressed from.
        tokens: text, int64 [sequences, length]; no labels are used.
        config: sizes and rates.
        work: folder in which an interrupted training goes on, as :func:`~fasc.compression.distillation.distil` says.

    Raises:
        UsageError: compression replaced no layer of the model, or there is only one sequence.
        ModelError: the two models do not have the same vocabulary.
        NonFiniteError: the divergence of the model as it was, or of a step, is not finite.
    """
    layers = replaced(model)
    if not layers:
        raise UsageError("the checkpoint has no compressed layers to train", "recover what `fasc compress` wrote without --merge")
    if model.config.vocab_size != dense.config.vocab_size:
        raise ModelError(
            f"the vocabularies differ: {model.config.vocab_size} and {dense.config.vocab_size}",
            "pass the --dense it was made from",
        )
    if len(tokens) < _LEAST:
        raise UsageError(f"{len(tokens)} sequence is too few: one is held out", "raise --sequences")
    held_out = max(1, len(tokens) // _HELD_OUT)
    text, unseen = tokens[:-held_out], tokens[-held_out:]
    rows = rows_of(config, tokens)
    measure = partial(_divergence_on, model.eval(), dense.eval(), unseen, rows, mixed=config.mixed_precision)
    before = measure()
    if not before < float("inf"):
        raise NonFiniteError(
            "the divergence of the compressed model from the dense one", "compress again: its weights are damaged"
        )
    parameters = list(dict.fromkeys(parameter for layer in layers for parameter in layer.parameters()))
    start = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
    with _only(model, layers):
        losses = distil(model, dense, text, config, work)
    model.eval()
    share, after = _go_as_far_as_it_helps(parameters, start, before, measure)
    return Recovered(before, after, share, unseen.numel(), tuple(losses))


_HELD_OUT, _LEAST = 16, 2
"""One sequence of so many is held out; the fewest sequences that leave one to train on."""


def _go_as_far_as_it_helps(
    parameters: Sequence[nn.Parameter], start: Sequence[Tensor], before: float, measure: Callable[[], float]
) -> tuple[float, float]:
    """Leave the weights at the best point found between ``start`` and where they are; gives its share and its divergence.

    Near its least the divergence is a parabola along a line, so three points give a fourth.
    """
    end = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    def go(share: float) -> None:
        with torch.no_grad():
            for parameter, old, new in zip(parameters, start, end, strict=True):
                parameter.copy_(old if share == 0 else torch.lerp(old, new, share))

    def tried(share: float) -> float:
        go(share)
        value = measure()
        return value if value < float("inf") else float("inf")

    found = {0.0: before, 1.0: tried(1.0), 0.5: tried(0.5)}
    bend = 2 * (found[1.0] - 2 * found[0.5] + found[0.0])
    if 0 < bend < float("inf"):
        least = (3 * found[0.0] + found[1.0] - 4 * found[0.5]) / (2 * bend)
        if 0 < least < 1:
            found[least] = tried(least)
    best = min(found, key=lambda share: found[share])
    go(best)
    return best, found[best]


def _divergence_on(model: PreTrainedModel, dense: PreTrainedModel, tokens: Tensor, rows: int, *, mixed: bool) -> float:
    """KL(dense ‖ compressed) on sequences, nats per token."""
    total = 0.0
    with (
        progress("measuring on held-out text", tokens.numel(), "tokens") as advance,
        torch.no_grad(),
        torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed),
    ):
        for ids in tokens.split(rows):
            target = dense(input_ids=ids.to(dense.device), use_cache=False).logits.flatten(0, 1)
            found = model(input_ids=ids.to(model.device), use_cache=False).logits.flatten(0, 1)
            total += divergence(found, target.to(found.device)).item() * ids.numel()
            advance(ids.numel())
    return total / tokens.numel()


def replaced(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that stand where compression replaced a layer."""
    units = getattr(getattr(model.config, "quantization_config", None), "units", ())
    return [model.get_submodule(name) for name in dict.fromkeys(name for unit in units for name in unit["layers"])]


@contextmanager
def _only(model: nn.Module, layers: Sequence[nn.Module]) -> Iterator[None]:
    """Only these layers are trained; afterwards everything is as trainable as before."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(requires_grad=False)
    for layer in layers:
        layer.requires_grad_()
    try:
        yield
    finally:
        for parameter, trainable in before:
            parameter.requires_grad_(trainable)
            parameter.grad = None
