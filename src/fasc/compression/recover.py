"""Recovery: the layers of a compressed model are trained to say what the dense model says.

Compressing layer by layer adds up errors that no layer can see. A short distillation can: the layers that compression replaced,
and the routers of experts that it made layers of their own (nothing else), minimise the KL divergence of its next-token
distribution from the dense model's on unlabelled text.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fasc.compression.distillation import distil, divergence_of, rows_of
from fasc.compression.options import RecoveryConfig
from fasc.edits.structure import edited_layers
from fasc.errors import ModelError, NonFiniteError, UsageError
from fasc.model.experts import routers
from fasc.model.scopes import evaluating, frozen
from fasc.processes import current
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


_HELD_OUT, _LEAST = 16, 2
"""One sequence of so many is held out; the fewest sequences that leave one to train on."""


def recover(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    tokens: Tensor,
    config: RecoveryConfig,
    work: Path | None = None,
    *,
    layers: Sequence[nn.Module] | None = None,
) -> Recovered:
    """Train the replaced layers of a compressed model towards the dense model's distributions, in place.

    Minimises ``KL(dense ‖ compressed)`` over the next token, in nats, by AdamW with a warm-up and a cosine decay to zero, in one
    pass over all but the last sixteenth of the sequences, in an order drawn by the seed. Everything else of the model stays as it
    is. The last sixteenth then says how far to go from the old weights towards the new ones (interpolation: arXiv:2109.01903):
    a short training on little text ends beyond its best point, and one at too high a rate far beyond, where it does harm. Both
    copies of the trained weights lie in the CPU's memory meanwhile.

    Args:
        model: compressed.
        dense: what it was compressed from.
        tokens: text, int64 [sequences, length]; no labels are used.
        config: sizes and rates.
        work: folder in which an interrupted training goes on, as :func:`~fasc.compression.distillation.distil` says.
        layers: what is trained, if not :func:`trained_modules`.

    Raises:
        UsageError: compression replaced no layer of the model, their weights are not in float32, or there is only one sequence.
        ModelError: the two models do not have the same vocabulary.
        NonFiniteError: the divergence of the model as it was, or of a step, is not finite.
    """
    layers = [model.get_submodule(name) for name in trained_modules(model)] if layers is None else layers
    parameters = list(dict.fromkeys(parameter for layer in layers for parameter in layer.parameters()))
    _require_trainable(model, dense, parameters, tokens)
    held_out = max(1, len(tokens) // _HELD_OUT)
    text, unseen = tokens[:-held_out], tokens[-held_out:]
    with evaluating(model, dense):
        measure = partial(_mean_divergence, model, dense, unseen.split(rows_of(config, tokens)), mixed=config.mixed_precision)
        before = measure()
        if not before < float("inf"):
            raise NonFiniteError(
                "the divergence of the compressed model from the dense one", "compress again: its weights are damaged"
            )
        start = [parameter.detach().to("cpu", copy=True) for parameter in parameters]
        with frozen(model, except_=layers):
            losses = distil(model, dense, parameters, text, config, work)
        share, after = _go_as_far_as_it_helps(parameters, start, before, measure)
    return Recovered(before, after, share, unseen.numel(), tuple(losses))


def trained_modules(model: nn.Module) -> list[str]:
    """Names of the layers that compression replaced and, where experts are among them, of their routers.

    What an expert says has changed, and so has how much of it is wanted.
    """
    return [*edited_layers(model), *routers(model)]


def _require_trainable(
    model: PreTrainedModel, dense: PreTrainedModel, parameters: Sequence[nn.Parameter], tokens: Tensor
) -> None:
    if not parameters:
        raise UsageError("the checkpoint has no compressed layers to train", "recover what `fasc compress` wrote without --merge")
    coarse = next((parameter.dtype for parameter in parameters if parameter.dtype != torch.float32), None)
    if coarse is not None:
        raise UsageError(f"the weights to train are {coarse}, which steps so small cannot change", "load the model as float32")
    ours, theirs = (one.config.get_text_config().vocab_size for one in (model, dense))
    if ours != theirs:
        raise ModelError(f"the vocabularies differ: {ours} and {theirs}", "pass the --dense it was made from")
    if len(tokens) < _LEAST:
        raise UsageError(f"{len(tokens)} sequence is too few: one is held out", "raise --sequences")


def _mean_divergence(model: PreTrainedModel, dense: PreTrainedModel, batches: Sequence[Tensor], *, mixed: bool) -> float:
    """KL(dense ‖ compressed) on sequences, nats per token."""
    own, total = batches[current().rank :: current().count], 0.0
    with progress("measuring on held-out text", sum(ids.numel() for ids in own), "tokens") as advance, torch.no_grad():
        for ids in own:
            total += float(divergence_of(model, dense, ids, mixed=mixed).double().sum())
            advance(ids.numel())
    every = float(current().summed(torch.tensor(total, dtype=torch.float64)))
    return every / sum(ids.numel() for ids in batches)


def _go_as_far_as_it_helps(
    parameters: Sequence[nn.Parameter], start: Sequence[Tensor], before: float, measure: Callable[[], float]
) -> tuple[float, float]:
    """Leave the weights at the best point tried between ``start`` and where they are.

    Near its least the divergence is a parabola along a line, so three points give a fourth.

    Returns:
        The share of the way, and the divergence there.
    """
    end = [parameter.detach().to("cpu", copy=True) for parameter in parameters]

    def go(share: float) -> None:
        with torch.no_grad():
            for parameter, old, new in zip(parameters, start, end, strict=True):
                parameter.copy_(old if share == 0 else torch.lerp(old, new, share))

    def at(share: float) -> float:
        go(share)
        value = measure()
        return value if value < float("inf") else float("inf")

    divergence = {0.0: before, 1.0: at(1.0), 0.5: at(0.5)}
    bend = 2 * (divergence[1.0] - 2 * divergence[0.5] + divergence[0.0])
    if 0 < bend < float("inf"):
        least = (3 * divergence[0.0] + divergence[1.0] - 4 * divergence[0.5]) / (2 * bend)
        if 0 < least < 1:
            divergence[least] = at(least)
    best = min(divergence, key=lambda share: divergence[share])
    go(best)
    return best, divergence[best]
