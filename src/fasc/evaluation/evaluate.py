"""Score a model on the chosen benchmarks."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.config import EvaluationConfig
from fasc.errors import UsageError
from fasc.evaluation._registry import Subject, get_benchmark
from fasc.evaluation.score import Score
from fasc.model.groups import evaluating


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    *,
    dense: PreTrainedModel | None = None,
    calibrated_on: str | None = None,
) -> list[Score]:
    """Run the benchmarks of ``config`` in order.

    Args:
        model: dense or compressed; scored in evaluation mode and left as it was.
        tokenizer: the model's own.
        config: benchmarks, text, limits.
        dense: what ``kl`` compares with.
        calibrated_on: digest of the text the model was calibrated on; evaluating on it prints a warning.

    Raises:
        UnknownNameError: a benchmark that does not exist; nothing is run then.
        UsageError: a benchmark needs the dense model.
        NonFiniteError: a model produced NaN or infinity; names the batch.
    """
    chosen = [get_benchmark(name) for name in config.benchmarks]
    for found in chosen:
        if found.needs_dense and dense is None:
            raise UsageError(f"`{found.name}` compares with the dense model and none is known", "pass --dense MODEL")
    scores: list[Score] = []
    with evaluating(model):
        for found in chosen:
            scores += found.measure(Subject(model, tokenizer, dense, calibrated_on), config)
    return scores
