"""Score a model on the chosen benchmarks."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.text.corpus import TokenBlock
from fasc.evaluation.options import EvaluationConfig
from fasc.errors import UsageError
from fasc.evaluation.registry import Subject, WindowScores, get_benchmark
from fasc.evaluation.score import Score
from fasc.evaluation.text import evaluation_texts
from fasc.model.groups import evaluating
from fasc.progress import say


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    *,
    dense: PreTrainedModel | None = None,
    texts: Sequence[TokenBlock] | None = None,
    seen: Collection[str] = (),
) -> list[Score]:
    """Run the benchmarks of ``config`` in order.

    Args:
        model: dense or compressed; scored in evaluation mode and left as it was.
        tokenizer: the model's own.
        config: benchmarks, text, limits.
        dense: what ``kl`` compares with.
        texts: the held-out texts, if they are at hand; loaded as ``config`` says otherwise. With several, the benchmarks that
            need text are run on each and named ``benchmark@corpus``.
        seen: digests of the texts that the model was made with; evaluating on one prints a warning.

    Raises:
        UnknownNameError: a benchmark that does not exist; nothing is run then.
        UsageError: a benchmark needs the dense model.
        NonFiniteError: a model produced NaN or infinity; names the batch.
    """
    chosen = [get_benchmark(name) for name in config.benchmarks]
    for found in chosen:
        if found.needs_dense and dense is None:
            raise UsageError(f"`{found.name}` compares with the dense model and none is known", "pass --dense MODEL")
    needed = any(found.needs_text for found in chosen)
    if texts is None:
        texts = evaluation_texts(model if dense is None else dense, tokenizer, config) if needed else []
    for corpus in [text.corpus for text in texts if text.text_digest in seen]:
        say(f"warning: `{corpus}` is the text this model was calibrated on; its scores will flatter it")
    scores: list[Score] = []
    compared = dense if any(found.needs_dense for found in chosen) else None
    passes: dict[str, dict[str, WindowScores]] = {text.corpus: {} for text in texts}
    with evaluating(model):
        for found in chosen:
            if not found.needs_text:
                scores += found.measure(Subject(model, tokenizer, compared), config)
                continue
            for text in texts:
                measured = found.measure(Subject(model, tokenizer, compared, text, passes[text.corpus]), config)
                scores += [_named(one, text.corpus, several=len(texts) > 1) for one in measured]
    return scores


def _named(score: Score, corpus: str, *, several: bool) -> Score:
    return replace(score, benchmark=f"{score.benchmark}@{corpus}") if several else score
