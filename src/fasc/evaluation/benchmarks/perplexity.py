"""Perplexity on held-out text."""

import math
from collections.abc import Sequence

from fasc.errors import NonFiniteError
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score, mean_interval
from fasc.evaluation.text import protocol, text_of, window_scores


@benchmark("perplexity", reference="exp of the mean negative log-likelihood per token", needs_text=True)
def perplexity(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """Perplexity per token in windows that do not overlap (stride = context); interval over windows."""
    block = text_of(subject)
    losses = window_scores(subject, config).nll
    value = _exp(float(losses.mean()))
    if value is None:
        raise NonFiniteError(f"the perplexity on `{block.corpus}`", "the model is damaged: it is far worse than a guess")
    low, high = map(_exp, mean_interval(losses.numpy()))
    n = block.tokens.shape[0] * (block.tokens.shape[1] - 1)
    return [Score("perplexity", "perplexity", value, low, high, n, protocol(config, block))]


def _exp(nats: float | None) -> float | None:
    """The perplexity of a loss; ``None`` of one that has none or whose perplexity no number can hold."""
    try:
        return None if nats is None else math.exp(nats)
    except OverflowError:
        return None
