"""The training of a recovery: AdamW towards the dense model's distributions, going on where it was killed."""

import time
from collections import defaultdict
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from fasc.compression.options import RecoveryConfig
from fasc.errors import NonFiniteError, StorageError
from fasc.linalg.divergence import kl_divergence
from fasc.processes import current
from fasc.progress import progress, say
from fasc.storage import new_file, require_free_space

_BETAS, _WARM_UP, _GRADIENT_NORM = (0.9, 0.95), 0.1, 1.0
"""Of AdamW; the share of the steps in which the rate rises; to what length gradients are clipped."""

_SAVE_SECONDS = 300.0
"""At most so much work is lost to a kill; writing the weights and the optimizer's two moments takes seconds."""

_STATE = "training.safetensors"


def rows_of(config: RecoveryConfig, tokens: Tensor) -> int:
    """Sequences per step."""
    return max(1, config.batch_tokens // tokens.shape[1])


def divergence_of(model: PreTrainedModel, dense: PreTrainedModel, ids: Tensor, *, mixed: bool) -> Tensor:
    """KL(dense ‖ model) of every token, nats, with a gradient for the model.

    Args:
        model: what is measured or trained.
        dense: what it is compared with.
        ids: int64 [sequences, length].
        mixed: multiply in bfloat16; the divergence itself is computed in float32.

    Returns:
        [sequences · length], on the model's device.
    """
    with torch.no_grad():
        reference = _logits(dense, ids, mixed=mixed)
    logits = _logits(model, ids, mixed=mixed)
    return kl_divergence(logits, reference.to(logits.device))


def _logits(model: PreTrainedModel, ids: Tensor, *, mixed: bool) -> Tensor:
    with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=mixed):
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return logits.flatten(0, 1)


def distil(
    model: PreTrainedModel,
    dense: PreTrainedModel,
    parameters: Sequence[nn.Parameter],
    text: Tensor,
    config: RecoveryConfig,
    work: Path | None = None,
) -> list[float]:
    """Minimise ``KL(dense ‖ model)``, in place, in one pass over the text in an order drawn by the seed.

    Inside :func:`fasc.processes.joined` each process takes its share of the sequences of every step; gradients are added up, so
    that all take the step of one process, up to the order of summation.

    AdamW without weight decay; the rate rises over the first tenth of the steps and falls to zero as a cosine.

    Args:
        model: in evaluation mode, because what is imitated has no dropout.
        dense: likewise; what the model is to say.
        parameters: those of the model that are trained; trainable, in float32.
        text: int64 [sequences, length].
        config: sizes and rates.
        work: every few minutes the state of the training is written there. A call that finds one goes on from it and ends with
            the same weights as one that nobody disturbed. It belongs to one model, text and configuration.

    Returns:
        The divergence of every step's batch, before the step; nats per token.

    Raises:
        NonFiniteError: the divergence of a step is not finite.
    """
    order = torch.randperm(len(text), generator=torch.Generator().manual_seed(config.seed))
    batches = text[order].split(rows_of(config, text))
    options = {"params": list(parameters), "initial_lr": config.learning_rate}
    optimizer = torch.optim.AdamW([options], lr=config.learning_rate, betas=_BETAS, weight_decay=0.0, fused=True)
    losses = [] if work is None else _resume(work / _STATE, parameters, optimizer)
    current().wait()  # until all have read what the first may write again
    remaining = batches[len(losses) :]
    schedule = get_cosine_schedule_with_warmup(optimizer, ceil(_WARM_UP * len(batches)), len(batches), last_epoch=len(losses) - 1)
    saved = time.monotonic()
    with progress("recovering", sum(ids.numel() for ids in remaining), "tokens") as advance:
        for ids in remaining:
            loss = _loss_and_gradients(model, dense, parameters, ids, config)
            losses.append(_finite(loss, step=len(losses) + 1))
            nn.utils.clip_grad_norm_(parameters, _GRADIENT_NORM)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            advance(ids.numel())
            unfinished = work is not None and len(losses) < len(batches)
            if work is not None and unfinished and current().first and time.monotonic() - saved >= _SAVE_SECONDS:
                _save(work / _STATE, parameters, optimizer, losses)
                saved = time.monotonic()
    return losses


def _loss_and_gradients(
    model: PreTrainedModel, dense: PreTrainedModel, parameters: Sequence[nn.Parameter], ids: Tensor, config: RecoveryConfig
) -> float:
    """The mean divergence of a batch, with the gradients of all processes' shares of it; nats per token."""
    own = ids[current().rank :: current().count]
    total = 0.0
    if len(own):
        loss = divergence_of(model, dense, own, mixed=config.mixed_precision).sum() / ids.numel()
        loss.backward()
        total = loss.item()
    if current().count == 1:
        return total
    reached = current().summed(torch.tensor([float(one.grad is not None) for one in parameters])) > 0
    for parameter, anywhere in zip(parameters, reached.tolist(), strict=True):
        if anywhere:  # one that no token of the batch reaches, such as of an idle expert, has none in any process
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            parameter.grad = current().summed(gradient)
    return float(current().summed(torch.tensor(total, dtype=torch.float64)))


def _finite(value: float, *, step: int) -> float:
    if not value < float("inf"):
        raise NonFiniteError(f"the divergence of recovery step {step}", "lower --learning-rate")
    return value


# The state of a training is one file, so that it is whole or not there: the trained weights, Adam's moments, the losses so far.
# The number of losses says where the schedule and the text stand. No random number is drawn after the order of the text.


def _save(file: Path, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, losses: Sequence[float]) -> None:
    """Write the state; where there is no space for it, the training goes on without."""
    state = {f"weight.{index}": parameter.detach().contiguous() for index, parameter in enumerate(parameters)}
    for index, moments in optimizer.state_dict()["state"].items():
        state |= {f"{name}.{index}": value.contiguous() for name, value in moments.items()}
    state["losses"] = torch.tensor(losses, dtype=torch.float64)
    try:
        require_free_space(file.parent, sum(value.numel() * value.element_size() for value in state.values()))
        with new_file(file) as scratch:
            save_file(state, scratch)
    except (StorageError, SafetensorError) as problem:
        say(f"the training goes on without being saved: {getattr(problem, 'message', problem)}")


def _resume(file: Path, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> list[float]:
    """Put a state back, if there is one; gives its losses."""
    if not file.is_file():
        return []
    try:
        state = load_file(file)
    except SafetensorError:
        say(f"`{file}` is damaged: the training starts anew")
        return []
    losses: list[float] = state.pop("losses").tolist()
    moments: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
    for key, value in state.items():
        name, _, index = key.rpartition(".")
        if name == "weight":
            parameters[int(index)].data.copy_(value)
        else:
            moments[int(index)][name] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": dict(moments)})
    return losses
