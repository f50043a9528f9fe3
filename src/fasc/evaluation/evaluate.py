"""Score a model on the chosen benchmarks."""

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.calibration.corpus import TokenBlock
from fasc.config import EvaluationConfig
from fasc.errors import UsageError
from fasc.evaluation._registry import Subject, get_benchmark
from fasc.evaluation.score import Score
from fasc.evaluation.text import evaluation_text
from fasc.model.groups import evaluating
from fasc.progress import say


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    *,
    dense: PreTrainedModel | None = None,
    text: TokenBlock | None = None,
    calibrated_on: str | None = None,
) -> list[Score]:
    """Run the benchmarks of ``config`` in order.

    Args:
        model: dense or compressed; scored in evaluation mode and left as it was.
        tokenizer: the model's own.
        config: benchmarks, text, limits.
        dense: what ``kl`` compares with.
        text: the held-out text, if it is at hand; loaded as ``config`` says otherwise.
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
    if text is None and any(found.needs_text for found in chosen):
        text = evaluation_text(model if dense is None else dense, tokenizer, config)
    if text is not None and text.text_digest == calibrated_on:
        say(f"warning: `{config.corpus}` is the text this model was calibrated on; its scores will flatter it")
    scores: list[Score] = []
    with evaluating(model):
        for found in chosen:
            scores += found.measure(Subject(model, tokenizer, dense, text), config)
    return scores
