"""The loop: batches through the model, moments out, the model left as it was."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fasc.statistics.extras import FORWARD_ONLY
from fasc.statistics.capture import GroupCapture, capturing, units_of
from fasc.statistics.objective import summed_nll
from fasc.statistics.moments import Need, Statistics
from fasc.model.options import LayersConfig
from fasc.statistics.options import CalibrationConfig, Labels
from fasc.errors import CorpusError, NonFiniteError
from fasc.model.blocks import block_names
from fasc.model.groups import InputGroup, evaluating, find_groups
from fasc.model.load import model_fingerprint
from fasc.progress import progress, say
from fasc.provenance import digest, provenance


def collect_moments(
    model: PreTrainedModel,
    tokens: Tensor,
    needs: frozenset[Need],
    *,
    calibration: CalibrationConfig | None = None,
    layers: LayersConfig | None = None,
    mask: Tensor | None = None,
) -> Statistics:
    """Measure the moments that ``needs`` names, on every input group of the model.

    Moments are streamed. The backward pass runs only if a gradient moment is asked for, and computes gradients of
    activations only. The model comes out as it went in: hooks, ``requires_grad``, ``.grad``, training mode, random state.

    Args:
        model: a dense causal language model.
        tokens: int64 [sequences, length].
        needs: the moments, e.g. the union of ``METHODS[name].needs`` over the methods to be used.
        calibration: labels, seed, batch size, checkpointing.
        layers: which layers.
        mask: 1 where there is text, [sequences, length]; padding is excluded from every moment.

    Raises:
        CorpusError: no tokens.
        ModelError: no layer to compress.
        NonFiniteError: a loss or a moment is NaN or infinite; names the batch or the layer.
    """
    calibration = calibration or CalibrationConfig()
    if tokens.numel() == 0:
        raise CorpusError("there are no calibration tokens", "give more text or raise --sequences")
    groups = find_groups(model, layers or LayersConfig())
    fingerprint = model_fingerprint(model)
    captures = [GroupCapture(group, needs, model.device) for group in groups]
    with capturing(model, captures), evaluating(model), _gradients_of_activations(model), ExitStack() as stack:
        if calibration.gradient_checkpointing:
            stack.enter_context(_checkpointed_blocks(model, groups))
        nll = _run(model, captures, tokens, mask, calibration)
    published: dict[str, Any] = {}
    idle: list[str] = []
    while captures:  # free each group's sums as its moments are made
        capture = captures.pop(0)
        if capture.tokens:
            published[capture.group.name] = capture.publish()
        else:
            idle.append(capture.group.name)
        del capture
    if idle:
        say(f"{len(idle)} groups got no token and have no moments, the first is `{idle[0]}`: give more text to hear all experts")
    meta = {
        "model_fingerprint": fingerprint,
        "token_digest": digest([tokens.cpu().numpy().tobytes()]),
        "labels": calibration.labels,
        "nll": nll,
        "needs": sorted([need.moment, need.scope] for need in needs),
        "calibration": calibration.model_dump(mode="json", exclude_none=True),
        "provenance": provenance(),
    }
    return Statistics(published, meta, text=tokens.cpu() if mask is None else None)


def memory_forecast(model: PreTrainedModel, groups: Sequence[InputGroup], needs: frozenset[Need]) -> dict[str, int]:
    """Bytes that measuring the moments takes beside the program itself, by part.

    Args:
        model: dense, loaded.
        groups: its input groups.
        needs: the moments.

    Returns:
        ``model`` (the weights), ``moments`` (float32 sums), ``totals`` (float64, from :data:`FLUSH_TOKENS` tokens on), ``batch``
        (what one batch of the default size leaves for its backward pass: about the inputs and outputs of every layer, and the
        logits, their logarithms and the gradients of both).
    """
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    entries = 0
    for group in groups:
        entries += group.d_in**2
        for scope, names in units_of(group, needs):
            d_out = sum(layer.d_out for layer in group.layers if layer.name in names)
            side = min(group.d_in, d_out)
            cross = Need("cross", scope) in needs
            entries += side**2 + (group.d_in * side if cross else 0)
    backward = not {need.moment for need in needs} <= {"input", *FORWARD_ONLY}
    per_group = [sum(layer.d_in + layer.d_out for layer in group.layers) for group in groups]
    per_token = (sum(per_group) if backward else max(per_group, default=0)) + 4 * model.get_input_embeddings().num_embeddings
    tokens = CalibrationConfig().batch_tokens
    return {
        "model": weights,
        "moments": 4 * entries,
        "totals": 8 * entries,
        "batch": tokens * per_token * model.dtype.itemsize,
    }


def _run(
    model: PreTrainedModel,
    captures: Sequence[GroupCapture],
    tokens: Tensor,
    mask: Tensor | None,
    calibration: CalibrationConfig,
) -> float | None:
    """Feed the captures; give the mean loss in nats per scored token, if it was computed."""
    total, scored = 0.0, 0
    rows = max(1, calibration.batch_tokens // tokens.shape[1])
    generator = torch.Generator(model.device).manual_seed(calibration.seed)
    precision = partial(torch.autocast, model.device.type, dtype=torch.bfloat16) if calibration.mixed_precision else nullcontext
    backward = any(capture.wants_gradients for capture in captures)
    with progress("measuring moments", tokens.numel(), "tokens") as advance, torch.set_grad_enabled(backward):
        for start in range(0, tokens.shape[0], rows):
            batch = tokens[start : start + rows].to(model.device)
            part = None if mask is None else mask[start : start + rows].to(model.device)
            with _listening(captures, part), precision():
                logits = model(input_ids=batch, attention_mask=part, use_cache=False).logits
            if backward:
                loss = summed_nll(logits, batch, part, calibration.labels, generator)
                total += float(loss.detach())
                scored += _scored(batch, part, calibration.labels)
                del logits  # the largest tensor of the pass, and the backward pass does not need it
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"the loss of calibration sequences {start}-{start + batch.shape[0] - 1}",
                        "load the model as --dtype float32, or check the text for degenerate sequences",
                    )
                loss.backward()
            advance(batch.numel())
    return total / scored if scored else None


def _scored(batch: Tensor, mask: Tensor | None, labels: Labels) -> int:
    """How many tokens the loss of a batch sums over."""
    text = torch.ones_like(batch) if mask is None else mask
    return int(text.sum()) if labels == "sampled" else int((text[:, 1:] * text[:, :-1]).sum())


@contextmanager
def _listening(captures: Sequence[GroupCapture], mask: Tensor | None) -> Iterator[None]:
    for capture in captures:
        capture.begin_batch(mask)
        capture.listening = True
    try:
        yield
    finally:
        for capture in captures:
            capture.listening = False


@contextmanager
def _gradients_of_activations(model: PreTrainedModel) -> Iterator[None]:
    """Freeze the parameters and let gradients start at the embeddings, so that no weight gradient is computed."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def require(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.requires_grad_() if torch.is_grad_enabled() else output

    handle = model.get_input_embeddings().register_forward_hook(require)
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's own signature
        yield
    finally:
        handle.remove()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _checkpointed_blocks(model: nn.Module, groups: Sequence[InputGroup]) -> Iterator[None]:
    """Recompute each block in the backward pass."""
    blocks = [model.get_submodule(name) for name in block_names(model, [group.layers[0].name for group in groups])]
    for block in blocks:
        block.forward = _recomputing(block.forward)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _recomputing(forward: Any) -> Any:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return wrapped
