"""Held-out text in windows, batch by batch."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.calibration.corpus import TextRequest, TokenBlock, load_corpus
from fasc.config import EvaluationConfig
from fasc.errors import NonFiniteError, UsageError
from fasc.evaluation._registry import Subject
from fasc.progress import progress


def evaluation_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig) -> TokenBlock:
    """The windows of the evaluation corpus: all of them in order, or a limited number drawn by the seed.

    Args:
        model: samples the corpus ``self``: the dense model, where there is one, so that all models see the same text.
        tokenizer: the model's own.
        config: corpus, limit, context, seed.
    """
    request = TextRequest(
        corpus=config.corpus,
        sequences=config.windows or config.limit,
        sequence_length=config.context,
        seed=config.seed,
        role="evaluation",
        data_dir=config.data_dir,
    )
    return load_corpus(model, tokenizer, request)


def text_of(subject: Subject) -> TokenBlock:
    """The held-out text a benchmark was promised."""
    if subject.text is None:
        raise UsageError("this benchmark needs held-out text and was given none", "register it with needs_text=True")
    return subject.text


def batches(block: TokenBlock, config: EvaluationConfig, what: str) -> Iterator[tuple[int, Tensor]]:
    """Rows of windows with the index of the first, with progress."""
    rows = max(1, config.batch_tokens // block.tokens.shape[1])
    with progress(what, block.tokens.numel(), "tokens") as advance:
        for start in range(0, block.tokens.shape[0], rows):
            batch = block.tokens[start : start + rows]
            yield start, batch
            advance(batch.numel())


def log_probabilities(model: PreTrainedModel, tokens: Tensor, where: str) -> Tensor:
    """Log p(next token | window so far), float32 [batch, length, vocabulary].

    Raises:
        NonFiniteError: the model produced NaN or infinity; names the batch. It is never dropped.
    """
    with torch.no_grad():
        logits = model(input_ids=tokens.to(model.device), use_cache=False).logits
    if not bool(torch.isfinite(logits).all()):
        raise NonFiniteError(f"the logits of {where}", "the model is damaged or overflows: load it as --dtype float32")
    return F.log_softmax(logits.float(), dim=-1)


def protocol(config: EvaluationConfig, block: TokenBlock) -> str:
    """Corpus, context and stride in words."""
    return f"{config.corpus}, {block.tokens.shape[0]} windows, context {config.context}, stride {config.context}"
