"""How far the compressed model's predictions moved from the dense model's."""

from collections.abc import Sequence

from fasc.evaluation.options import EvaluationConfig
from fasc.errors import UsageError
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Score, mean_interval
from fasc.evaluation.text import protocol, text_of, window_scores


@benchmark("kl", reference="KL(dense ‖ compressed) per token", needs_dense=True, needs_text=True)
def kl(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """KL divergence from the dense model, nats per token, on held-out text; interval over windows."""
    if subject.dense is None:
        raise UsageError("`kl` compares with the dense model and none is known", "pass --dense MODEL")
    block = text_of(subject)
    divergences = window_scores(subject, config).kl or []
    low, high = mean_interval(divergences)
    value = sum(divergences) / len(divergences)
    return [Score("kl", "nats/token", value, low, high, block.tokens.numel(), protocol(config, block))]
