"""Held-out text in windows, batch by batch."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.text.corpus import TextRequest, TokenBlock, load_corpus
from fasc.evaluation.options import EvaluationConfig
from fasc.errors import NonFiniteError, UsageError
from fasc.evaluation.registry import Subject, WindowScores
from fasc.progress import progress


def evaluation_texts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: EvaluationConfig) -> list[TokenBlock]:
    """The windows of each evaluation corpus: all of them in order, or a limited number drawn by the seed.

    Args:
        model: samples the corpus ``self``: the dense model, where there is one, so that all models see the same text.
        tokenizer: the model's own.
        config: corpora, limit, context, seed.
    """
    requests = [
        TextRequest(
            corpus=corpus,
            sequences=config.windows or config.limit,
            sequence_length=config.context,
            seed=config.seed,
            role="evaluation",
            data_dir=config.data_dir,
        )
        for corpus in config.corpora
    ]
    return [load_corpus(model, tokenizer, request) for request in requests]


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


def window_scores(subject: Subject, config: EvaluationConfig) -> WindowScores:
    """Loss and divergence of every window, from one forward pass of each model.

    Raises:
        NonFiniteError: a model produced NaN or infinity; names the windows.
    """
    known = {} if subject.passes is None else subject.passes
    if _PASS not in known:
        known[_PASS] = _run_windows(subject, config)
    return known[_PASS]


_PASS = "windows"


def _run_windows(subject: Subject, config: EvaluationConfig) -> WindowScores:
    losses: list[float] = []
    divergences: list[float] = []
    what = "perplexity" if subject.dense is None else "perplexity and kl"
    for start, tokens in batches(text_of(subject), config, what):
        where = f"{what}, windows {start}-{start + len(tokens) - 1}"
        scores = log_probabilities(subject.model, tokens, where)
        targets = tokens[:, 1:].to(scores.device)
        nll = -scores[:, :-1].gather(-1, targets[..., None]).squeeze(-1)
        losses += nll.double().mean(-1).tolist()
        if subject.dense is not None:
            reference = log_probabilities(subject.dense, tokens, f"{where} (dense model)")
            scores = scores.to(reference.device)
            scores.sub_(reference).mul_(reference.exp_()).neg_()  # p (log p − log q), in place: vocabularies are wide
            divergences += scores.sum(-1).double().mean(-1).tolist()
    return WindowScores(losses, divergences if subject.dense is not None else None)


def protocol(config: EvaluationConfig, block: TokenBlock) -> str:
    """Corpus, context and stride in words."""
    return f"{block.corpus}, {block.tokens.shape[0]} windows, context {config.context}, stride {config.context}"
