"""The training of a recovery: towards the dense model's distributions, by transformers' Trainer, going on where it was killed."""

import shutil
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fasc.compression.options import RecoveryConfig
from fasc.errors import NonFiniteError
from fasc.model.quiet import quiet_transformers
from fasc.progress import Advance, progress
from fasc.storage import read_json, write_json


def rows_of(config: RecoveryConfig, tokens: Tensor) -> int:
    """Sequences per step."""
    return max(1, config.batch_tokens // tokens.shape[1])


def distil(
    model: PreTrainedModel, dense: PreTrainedModel, text: Tensor, config: RecoveryConfig, work: Path | None = None
) -> list[float]:
    """Minimise ``KL(dense ‖ model)`` over the parameters that are trainable, in place, in one pass over the text.

    Args:
        model: with its weights in float32.
        dense: what it is to say.
        text: int64 [sequences, length].
        config: sizes and rates.
        work: every few minutes the state of the training is written there, and a call that finds one goes on from it and ends
            with the same weights as one that nobody disturbed. It belongs to one model, text and configuration.

    Returns:
        The divergence of every step's batch, before the step.

    Raises:
        NonFiniteError: the divergence of a step is not finite.
    """
    with ExitStack() as stack:
        folder = work or Path(stack.enter_context(TemporaryDirectory()))
        saved = _last_saved(folder)
        losses = [] if saved is None else read_json(saved / _LOSSES)
        rows = rows_of(config, text)
        left = text.numel() - len(losses) * rows * text.shape[1]
        advance = stack.enter_context(progress("recovering", left, "tokens"))
        trainer = _Distillation(
            model,
            args=_arguments(config, rows, model, folder),
            train_dataset=_Sequences(text),
            data_collator=_stack,
            callbacks=[] if work is None else [_NowAndThen(model, folder)],
        )
        trainer.remove_callback(PrinterCallback)  # prints to stdout
        trainer.dense, trainer.losses, trainer.advance = dense, losses, advance
        stack.enter_context(quiet_transformers())
        trainer.train(resume_from_checkpoint=None if saved is None else str(saved))
    return losses


_MOMENTS, _SCHEDULE, _LOSSES = "moments.safetensors", "schedule.json", "losses.json"
"""Files of a state; the last is written last, and a state without it is not whole."""

_SAVE_SECONDS = 300.0
"""At most so much work is lost to a kill; writing the weights and the optimizer's two moments takes seconds."""


def _last_saved(folder: Path) -> Path | None:
    whole = [path.parent for path in folder.glob(f"checkpoint-*/{_LOSSES}")]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class _NowAndThen(TrainerCallback):
    """Saves by the clock, so that it costs as little on a fast machine as on a slow one, and only where there is space."""

    def __init__(self, model: nn.Module, folder: Path) -> None:
        trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
        self._folder, self._needed, self._last = folder, 4 * trained, time.monotonic()

    def on_step_end(self, _args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        due = time.monotonic() - self._last >= _SAVE_SECONDS and state.global_step < state.max_steps
        if due and shutil.disk_usage(self._folder).free > self._needed:
            control.should_save = True

    def on_save(self, *_: Any, **__: Any) -> None:
        self._last = time.monotonic()


def _arguments(config: RecoveryConfig, rows: int, model: PreTrainedModel, folder: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=rows,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        seed=config.seed,
        use_cpu=model.device.type == "cpu",
        bf16=config.mixed_precision,
        report_to="none",
        save_strategy="no",  # but when a callback asks for it
        save_total_limit=2,  # the older one stands until the newer one is whole
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


class _Distillation(Trainer):
    dense: PreTrainedModel
    losses: list[float]
    """Of the steps so far."""

    advance: Advance

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *_args: Any, **_kwargs: Any) -> Tensor:
        """KL(dense ‖ compressed), the mean over tokens."""
        model.eval()  # what is imitated has no dropout
        ids = inputs["input_ids"]
        with torch.no_grad(), self.accelerator.autocast():  # the trainer multiplies in bfloat16 in the model it trains only
            target = self.dense(input_ids=ids.to(self.dense.device), use_cache=False).logits
        found = model(input_ids=ids, use_cache=False).logits
        loss: Tensor = divergence(found.flatten(0, 1), target.flatten(0, 1).to(found.device))
        value = float(loss.detach())
        if not value < float("inf"):
            step = len(self.losses) + 1
            raise NonFiniteError(f"the divergence of recovery step {step}", "lower --learning-rate")
        self.losses.append(value)
        self.advance(ids.numel())
        return loss

    # The trainer's own files are pickles. What it needs to go on is tensors and numbers: Adam's moments and the schedule's place.
    # No random number is drawn after the order of the text, which follows from the seed.

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """The weights that are trained, and no others."""
        folder = Path(str(output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        trained = {name: p.detach().contiguous() for name, p in self.model.named_parameters() if p.requires_grad}
        save_file(trained, folder / "model.safetensors")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        state = self.optimizer.state_dict()["state"]
        moments = {f"{index}.{name}": value.contiguous() for index, kept in state.items() for name, value in kept.items()}
        save_file(moments, Path(output_dir) / _MOMENTS)
        write_json(Path(output_dir) / _SCHEDULE, self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state: defaultdict[int, dict[str, Tensor]] = defaultdict(dict)
        for key, value in load_file(Path(checkpoint) / _MOMENTS).items():
            index, _, name = key.partition(".")
            state[int(index)][name] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": dict(state)})
        self.lr_scheduler.load_state_dict(read_json(Path(checkpoint) / _SCHEDULE))
        for group, rate in zip(self.optimizer.param_groups, self.lr_scheduler.get_last_lr(), strict=True):
            group["lr"] = rate

    def _save_rng_state(self, output_dir: str) -> None:
        pass

    def _load_rng_state(self, checkpoint: str | None) -> None:
        pass

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        write_json(Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}" / _LOSSES, self.losses)


def divergence(found: Tensor, target: Tensor) -> Tensor:
    """``KL(softmax(target) ‖ softmax(found))`` in nats, the mean over tokens, with a gradient for ``found``.

    Args:
        found: logits, [tokens, vocabulary].
        target: logits, [tokens, vocabulary]; gets no gradient.

    Returns:
        A float32 scalar; it has a first derivative only.
    """
    value: Tensor = _Divergence.apply(found, target)
    return value


class _Divergence(torch.autograd.Function):
    """The value and its gradient, ``(q - p) / tokens``, in float32 and in one pass over a few tokens at a time.

    The six matrices of tokens × vocabulary that autograd would keep take longer to write and read than half of a step's products
    (docs/log.md).
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, target: Tensor) -> Tensor:
        gradient = torch.empty_like(found) if ctx.needs_input_grad[0] else None
        rows = max(1, _ENTRIES // found.shape[1])
        parts = []
        for at in range(0, found.shape[0], rows):
            log_q = F.log_softmax(found[at : at + rows].float(), dim=-1)
            log_p = F.log_softmax(target[at : at + rows].float(), dim=-1)
            probability = log_p.exp()
            parts.append(torch.dot(probability.flatten(), log_p.sub_(log_q).flatten()))
            if gradient is not None:
                gradient[at : at + rows] = log_q.exp_().sub_(probability).div_(found.shape[0])
        ctx.save_for_backward(gradient)
        return torch.stack(parts).sum() / found.shape[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer, None


_ENTRIES = 2**21
"""Logits looked at together: few enough to stay in a cache, many enough to keep a GPU busy."""


class _Sequences(Dataset[Tensor]):
    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def __getitem__(self, index: int) -> Tensor:
        return self.tokens[index]


def _stack(rows: Sequence[Tensor]) -> dict[str, Tensor]:
    return {"input_ids": torch.stack(list(rows))}
