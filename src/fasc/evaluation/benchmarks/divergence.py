"""How far the compressed model's predictions moved from the dense model's."""

from collections.abc import Sequence

import numpy as np

from fasc.errors import UsageError
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, benchmark
from fasc.evaluation.score import Interval, Score, clustered_proportion_interval, mean_interval, quantile_interval
from fasc.evaluation.text import protocol, text_of, window_outcome, window_scores


@benchmark("kl", reference="KL(dense ‖ compressed) per token", needs_dense=True, needs_text=True)
def kl(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """KL divergence from the dense model, nats per token: mean and tail; how often both hold the same token for most probable."""
    block, scores = text_of(subject), window_scores(subject, config)
    if scores.kl is None or scores.agreement is None:
        raise UsageError("`kl` compares with the dense model and none is known", "pass --dense MODEL")
    divergence, agreement = scores.kl.double().numpy(), scores.agreement.numpy()

    windows = divergence.mean(axis=1)
    subject.keep("kl", [window_outcome(block, index, -float(value)) for index, value in enumerate(windows)])

    def score(metric: str, value: float, interval: Interval, of: str) -> Score:
        return Score("kl", metric, value, *interval, divergence.size, f"{of}; {protocol(config, block)}")

    tail = [
        score(f"kl/p{100 * level:.0f}", float(np.quantile(divergence, level)), quantile_interval(divergence, level), "nats")
        for level in (0.95, 0.99)
    ]
    low, high = mean_interval(windows)
    mean = score(
        "kl", float(divergence.mean()), (low if low is None else max(0.0, low), high), "nats per token"
    )  # never negative
    same = score("top-1 agreement", float(agreement.mean()), clustered_proportion_interval(agreement), "share of tokens")
    return [mean, *tail, same]
