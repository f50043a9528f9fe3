"""Held-out text in windows, batch by batch."""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import UsageError
from fasc.evaluation.likelihood import finite_logits, window_losses
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.registry import Subject, WindowScores
from fasc.linalg.divergence import kl_divergence
from fasc.processes import current
from fasc.progress import progress, say
from fasc.text.corpus import TextRequest, TokenBlock, load_corpus


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


def window_scores(subject: Subject, config: EvaluationConfig) -> WindowScores:
    """Loss, divergence and agreement on every window, from one forward pass of each model.

    Raises:
        NonFiniteError: a model produced NaN or infinity; names the windows.
    """
    known = {} if subject.passes is None else subject.passes
    if _PASS not in known:
        known[_PASS] = _run_windows(subject, config)
    return known[_PASS]


_PASS = "windows"


def _run_windows(subject: Subject, config: EvaluationConfig) -> WindowScores:
    block, what = text_of(subject), "perplexity" if subject.dense is None else "perplexity and kl"
    if len(block.tokens) == 1:
        say(f"warning: `{block.corpus}` gives one window of text, so its scores have no interval: raise --limit or --windows")
    losses: list[Tensor] = []
    divergences: list[Tensor] = []
    agreements: list[Tensor] = []
    for start, ids in _batches(block, config, what):
        where = f"{what}, windows {start}-{start + len(ids) - 1}"
        logits = finite_logits(subject.model, ids, where)
        losses.append(window_losses(logits, ids))
        if subject.dense is not None:
            reference = finite_logits(subject.dense, ids, f"{where} (dense model)").to(logits.device)
            divergences.append(kl_divergence(logits, reference).cpu())
            agreements.append(logits.argmax(-1).eq(reference.argmax(-1)).cpu())
    compared = subject.dense is not None
    together = current().gathered
    return WindowScores(
        together(torch.cat(losses)),
        together(torch.cat(divergences)) if compared else None,
        together(torch.cat(agreements)) if compared else None,
    )


def _batches(block: TokenBlock, config: EvaluationConfig, what: str) -> Iterator[tuple[int, Tensor]]:
    """This process's rows of windows with the index of the first, with progress."""
    rows = max(1, config.batch_tokens // block.tokens.shape[1])
    own = current().batches(len(block.tokens), rows)
    with progress(what, sum(block.tokens[part].numel() for part in own), "tokens") as advance:
        for part in own:
            batch = block.tokens[part]
            yield part.start, batch
            advance(batch.numel())


def window_outcome(block: TokenBlock, index: int, per_token: float) -> Outcome:
    """A window of text as an item, for comparing models window by window."""
    return Outcome(f"{block.corpus}, window {index}", block.corpus, "", "", None, per_token)


def protocol(config: EvaluationConfig, block: TokenBlock) -> str:
    """Corpus, context and stride in words."""
    return f"{block.corpus}, {block.tokens.shape[0]} windows, context {config.context}, stride {config.context}"
