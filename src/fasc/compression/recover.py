"""Recovery: the layers of a compressed model are trained to say what the dense model says.

Compressing layer by layer adds up errors that no layer can see. A short distillation can: the layers that compression replaced
(nothing else) minimise the KL divergence of its next-token distribution from the dense model's on unlabelled text.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from fasc.config import RecoveryConfig
from fasc.errors import ModelError, NonFiniteError, UsageError
from fasc.model.quiet import quiet_transformers
from fasc.progress import Advance, progress


def recover(model: PreTrainedModel, dense: PreTrainedModel, tokens: Tensor, config: RecoveryConfig) -> list[float]:
    """Train the replaced layers of a compressed model towards the dense model's distributions, in place.

    Minimises ``KL(dense ‖ compressed)`` over the next token, in nats, by AdamW with a warm-up and a cosine decay to zero, in one
    pass over the tokens in an order drawn by the seed. Everything else of the model stays as it is.

    Args:
        model: compressed; weights in float32, because steps are smaller than what bfloat16 resolves.
        dense: what it was compressed from.
        tokens: text, int64 [sequences, length]; no labels are used.
        config: sizes and rates.

    Returns:
        The KL divergence of each step's batch before the step, nats per token.

    Raises:
        UsageError: compression replaced no layer of the model.
        ModelError: the two models do not have the same vocabulary.
        NonFiniteError: the divergence of a step is not finite.
    """
    layers = replaced(model)
    if not layers:
        raise UsageError("the checkpoint has no compressed layers to train", "recover what `fasc compress` wrote without --merge")
    if model.config.vocab_size != dense.config.vocab_size:
        raise ModelError(
            f"the vocabularies differ: {model.config.vocab_size} and {dense.config.vocab_size}",
            "pass the --dense it was made from",
        )
    rows = max(1, config.batch_tokens // tokens.shape[1])
    with progress("recovering", tokens.numel(), "tokens") as advance, TemporaryDirectory() as scratch, _only(model, layers):
        trainer = _Distillation(
            model,
            args=_arguments(config, rows, model, scratch),
            train_dataset=_Sequences(tokens),
            data_collator=_stack,
        )
        trainer.remove_callback(PrinterCallback)  # prints to stdout
        trainer.dense, trainer.losses, trainer.advance = dense.eval(), [], advance
        with quiet_transformers():
            trainer.train()
    model.eval()
    return trainer.losses


def replaced(model: PreTrainedModel) -> list[nn.Module]:
    """The modules that stand where compression replaced a layer."""
    units = getattr(getattr(model.config, "quantization_config", None), "units", ())
    return [model.get_submodule(name) for name in dict.fromkeys(name for unit in units for name in unit["layers"])]


def _arguments(config: RecoveryConfig, rows: int, model: PreTrainedModel, folder: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=folder,
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
        save_strategy="no",
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


def divergence(found: Tensor, target: Tensor) -> Tensor:
    """``KL(softmax(target) ‖ softmax(found))`` in nats, the mean over tokens, with a gradient for ``found``.

    Args:
        found: logits, [tokens, vocabulary].
        target: logits, [tokens, vocabulary]; gets no gradient.

    Returns:
        A float32 scalar.
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
        gradient = torch.empty_like(found)
        rows = max(1, _ENTRIES // found.shape[1])
        parts = []
        for q, p, into in zip(found.split(rows), target.split(rows), gradient.split(rows), strict=True):
            log_q, log_p = F.log_softmax(q.float(), dim=-1), F.log_softmax(p.float(), dim=-1)
            probability = log_p.exp()
            parts.append(torch.dot(probability.flatten(), log_p.sub_(log_q).flatten()))
            into.copy_(log_q.exp_().sub_(probability).div_(found.shape[0]))
        ctx.save_for_backward(gradient)
        return torch.stack(parts).sum() / found.shape[0]

    @staticmethod
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
