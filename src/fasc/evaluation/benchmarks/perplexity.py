"""Perplexity on held-out text."""

from collections.abc import Sequence

from fasc.errors import NonFiniteError
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score, exponential, mean_interval
from fasc.evaluation.text import protocol, text_of, window_outcome, window_scores


@benchmark("perplexity", reference="exp of the mean negative log-likelihood per token", needs_text=True)
def perplexity(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """Perplexity per token in windows that do not overlap (stride = context); interval over windows."""
    block = text_of(subject)
    losses = window_scores(subject, config).nll
    value = exponential(float(losses.mean()))
    if value is None:
        raise NonFiniteError(f"the perplexity on `{block.corpus}`", "the model is damaged: it is far worse than a guess")
    low, high = map(exponential, mean_interval(losses.numpy()))
    subject.keep("perplexity", [window_outcome(block, index, -loss) for index, loss in enumerate(losses.tolist())])
    n = block.tokens.shape[0] * (block.tokens.shape[1] - 1)
    return [Score("perplexity", "perplexity", value, low, high, n, protocol(config, block))]
