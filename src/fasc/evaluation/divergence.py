"""How far the compressed model's predictions moved from the dense model's."""

from collections.abc import Sequence

from fasc.config import EvaluationConfig
from fasc.errors import UsageError
from fasc.evaluation._registry import Subject, benchmark
from fasc.evaluation.score import Score, mean_interval
from fasc.evaluation.text import batches, log_probabilities, protocol, text_of


@benchmark("kl", reference="KL(dense ‖ compressed) per token", needs_dense=True, needs_text=True)
def kl(subject: Subject, config: EvaluationConfig) -> Sequence[Score]:
    """KL divergence from the dense model, nats per token, on held-out text; interval over windows."""
    if subject.dense is None:
        raise UsageError("`kl` compares with the dense model and none is known", "pass --dense MODEL")
    block = text_of(subject)
    divergences: list[float] = []
    for start, tokens in batches(block, config, "kl"):
        where = f"kl windows {start}-{start + len(tokens) - 1}"
        reference = log_probabilities(subject.dense, tokens, f"{where} (dense model)")
        scores = log_probabilities(subject.model, tokens, where).to(reference.device)
        scores.sub_(reference).mul_(reference.exp_()).neg_()  # p (log p − log q), in place: vocabularies are wide
        divergences += scores.sum(-1).double().mean(-1).tolist()
    low, high = mean_interval(divergences)
    value = sum(divergences) / len(divergences)
    return [Score("kl", "nats/token", value, low, high, block.tokens.numel(), protocol(config, block))]
