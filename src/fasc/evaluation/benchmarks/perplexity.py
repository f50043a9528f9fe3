"""Perplexity on held-out text."""

import math
from collections.abc import Sequence

from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score, mean_interval
from fasc.evaluation.text import protocol, text_of, window_scores


@benchmark("perplexity", reference="exp of the mean negative log-likelihood per token", needs_text=True)
def perplexity(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """Perplexity per token in windows that do not overlap (stride = context); interval over windows."""
    block = text_of(subject)
    losses = window_scores(subject, config).nll
    low, high = mean_interval(losses)
    n = block.tokens.shape[0] * (block.tokens.shape[1] - 1)
    value = math.exp(sum(losses) / len(losses))
    return [Score("perplexity", "perplexity", value, math.exp(low), math.exp(high), n, protocol(config, block))]
