"""Text sampled from the model itself: calibration without any data."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import LogitsProcessor, LogitsProcessorList

from fasc.errors import CorpusError, NonFiniteError
from fasc.progress import progress

_BATCH = 64
"""Sequences sampled side by side."""


class _Draw(LogitsProcessor):
    """Draws the next token and leaves it the only finite logit; reports progress and refuses non-finite logits.

    By the inverse of the cumulated probabilities: one random number per sequence. ``torch.multinomial`` draws one for every
    word of the vocabulary, on one thread, which took a third of the time.
    """

    def __init__(self, generator: torch.Generator, advance: Callable[[int], None]) -> None:
        self._generator, self._advance = generator, advance

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool(torch.isfinite(scores).all()):
            raise NonFiniteError(f"the logits of sampled token {input_ids.shape[1]}", "load the model as --dtype float32")
        cumulated = scores.float().softmax(-1).cumsum(-1, dtype=torch.float64)
        uniform = torch.rand(scores.shape[0], 1, generator=self._generator, dtype=torch.float64).to(scores.device)
        drawn = torch.searchsorted(cumulated, uniform * cumulated[:, -1:], right=True)  # right: no word of probability zero
        self._advance(scores.shape[0])
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.clamp_(max=scores.shape[1] - 1), 0.0)


def sample_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sequences: int, sequence_length: int, seed: int
) -> Tensor:
    """Sample sequences from the model at temperature 1, from its beginning-of-text token.

    An end-of-text token does not stop a sequence: the model goes on with the next text, as in packed training data. The
    global random state is neither read nor changed.

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
    generator = torch.Generator().manual_seed(seed)
    total = sequences * (sequence_length - 1)
    with progress("sampling text from the model", total, "tokens") as advance:
        parts = []
        for first in range(0, sequences, _BATCH):
            rows = min(_BATCH, sequences - first)
            parts.append(_sample(model, torch.full((rows, 1), start), sequence_length, _Draw(generator, advance)))
    return torch.cat(parts)


def _sample(model: PreTrainedModel, starts: Tensor, length: int, draw: _Draw) -> Tensor:
    starts = starts.to(model.device)
    sampled: Tensor = model.generate(
        starts,
        attention_mask=torch.ones_like(starts),
        do_sample=False,  # the processor has drawn; the only finite logit is the greatest
        num_beams=1,
        max_length=None,
        max_new_tokens=length - 1,
        eos_token_id=None,
        pad_token_id=int(starts[0, 0]),
        repetition_penalty=1.0,
        logits_processor=LogitsProcessorList([draw]),
    )
    return sampled[:, :length].cpu()
