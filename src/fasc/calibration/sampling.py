"""Text sampled from the model itself: calibration without any data."""

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, LogitsProcessorList

from fasc.errors import CorpusError, NonFiniteError
from fasc.progress import progress

_BATCH = 64
"""Sequences sampled side by side."""


class _Step(LogitsProcessor):
    """Reports progress, refuses non-finite logits, and lets nothing else happen."""

    def __init__(self, advance, rows: int) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
        self._advance, self._rows = advance, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError(f"the logits of sampled token {input_ids.shape[1]}", "load the model as --dtype float32")
        self._advance(self._rows)
        return scores


def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: int, sequence_length: int, seed: int
) -> Tensor:
    """Sample sequences from the model at temperature 1, from its beginning-of-text token.

    An end-of-text token does not stop a sequence: the model goes on with the next text, as in packed training data. The
    global random state is left as it was.

    Args:
        model: a causal language model.
        tokenizer: the model's own.
        sequences: how many.
        sequence_length: tokens in each, the first one included.
        seed: the same seed gives the same text on the same machine.

    Returns:
        int64 [sequences, sequence_length] on the CPU.

    Raises:
        CorpusError: the model has no token to begin with.
        NonFiniteError: the model produced NaN or infinity.
    """
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise CorpusError("the tokenizer has no beginning-of-text token to sample from", "use a text file as --corpus")
    devices = [model.device] if model.device.type == "cuda" else []
    total = sequences * (sequence_length - 1)
    with torch.random.fork_rng(devices), progress("sampling text from the model", total, "tokens") as advance:
        torch.manual_seed(seed)
        parts = []
        for first in range(0, sequences, _BATCH):
            rows = min(_BATCH, sequences - first)
            parts.append(_sample(model, torch.full((rows, 1), start), sequence_length, _Step(advance, rows)))
    return torch.cat(parts)


def _sample(model: PreTrainedModel, starts: Tensor, length: int, step: _Step) -> Tensor:
    starts = starts.to(model.device)
    sampled: Tensor = model.generate(
        starts,
        attention_mask=torch.ones_like(starts),
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_length=None,
        max_new_tokens=length - 1,
        eos_token_id=None,
        pad_token_id=int(starts[0, 0]),
        repetition_penalty=1.0,
        logits_processor=LogitsProcessorList([step]),
    )
    return sampled[:, :length].cpu()
