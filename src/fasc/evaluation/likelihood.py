"""What a model says of the next token, refused where it is not finite."""

import inspect

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from fasc.errors import NonFiniteError


def finite_logits(model: PreTrainedModel, ids: Tensor, where: str) -> Tensor:
    """Logits of the next token after each position, [sequences, length, vocabulary], in the model's precision.

    Raises:
        NonFiniteError: the model produced NaN or infinity; names the batch. It is never dropped.
    """
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    return _require_finite(logits, where)


def last_log_probabilities(model: PreTrainedModel, ids: Tensor, where: str) -> Tensor:
    """Log-probabilities of the next token after the last position, float32 [sequences, vocabulary], on the CPU.

    Raises:
        NonFiniteError: the model produced NaN or infinity; names the batch.
    """
    only_last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False, **only_last).logits[:, -1]
    return F.log_softmax(_require_finite(logits, where), dim=-1, dtype=torch.float32).cpu()


def window_losses(logits: Tensor, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of each sequence's own tokens after the first, in nats; float64 [sequences], on the CPU.

    Args:
        logits: [sequences, length, vocabulary]; taken one sequence at a time, because vocabularies are wide.
        ids: int64 [sequences, length].
    """
    targets = ids[:, 1:].to(logits.device)
    losses = [F.cross_entropy(one[:-1].float(), target, reduction="none") for one, target in zip(logits, targets, strict=True)]
    return torch.stack(losses).double().mean(-1).cpu()


def _require_finite(logits: Tensor, where: str) -> Tensor:
    ends = torch.stack(torch.aminmax(logits))  # NaN if any is; takes no memory, as comparing every logit would
    if not bool(torch.isfinite(ends).all()):
        raise NonFiniteError(f"the logits of {where}", "the model is damaged or overflows: load it as --dtype float32")
    return logits
