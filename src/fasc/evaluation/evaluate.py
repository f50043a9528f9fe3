"""Score a model on the chosen benchmarks."""

from collections.abc import Collection, Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import UsageError
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.registry import Subject, WindowScores, get_benchmark
from fasc.evaluation.score import Score
from fasc.evaluation.text import evaluation_texts
from fasc.model.load import model_fingerprint
from fasc.model.scopes import evaluating
from fasc.processes import current
from fasc.progress import say
from fasc.provenance import versions
from fasc.text.corpus import TokenBlock


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

    Inside :func:`fasc.processes.joined` each process scores its share of the items and windows, and all get the same scores.

    Args:
        model: dense or compressed; scored in evaluation mode and left as it was, as is ``dense``.
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
    benchmarks = [get_benchmark(name) for name in config.benchmarks]
    for benchmark in benchmarks:
        if benchmark.needs_dense and dense is None:
            raise UsageError(f"`{benchmark.name}` compares with the dense model and none is known", "pass --dense MODEL")
    needs_text = any(benchmark.needs_text for benchmark in benchmarks)
    if texts is None:
        texts = evaluation_texts(model if dense is None else dense, tokenizer, config) if needs_text else []
    _require_same(model, config, texts)
    for corpus in [text.corpus for text in texts if text.text_digest in seen]:
        say(f"warning: `{corpus}` is the text this model was calibrated on; its scores will flatter it")
    scores: list[Score] = []
    compared = dense if any(benchmark.needs_dense for benchmark in benchmarks) else None
    passes: dict[str, dict[str, WindowScores]] = {text.corpus: {} for text in texts}
    with evaluating(model) if compared is None else evaluating(model, compared):
        for benchmark in benchmarks:
            if not benchmark.needs_text:
                scores += benchmark.measure(Subject(model, tokenizer, compared), config)
                continue
            for text in texts:
                measured = benchmark.measure(Subject(model, tokenizer, compared, text, passes[text.corpus]), config)
                scores += [_named(one, text.corpus, several=len(texts) > 1) for one in measured]
    return scores


def _require_same(model: PreTrainedModel, config: EvaluationConfig, texts: Sequence[TokenBlock]) -> None:
    """See that all processes score the same model on the same texts, where there are several."""
    if current().count > 1:
        same = {"model": model_fingerprint(model), "text": " ".join(text.text_digest for text in texts)}
        same |= {name: str(value) for name, value in config.model_dump(exclude={"data_dir"}).items()}
        current().require_same(versions() | same)
        for text in texts:
            current().batches(len(text.tokens), 1)  # refuses more processes than windows


def _named(score: Score, corpus: str, *, several: bool) -> Score:
    return replace(score, benchmark=f"{score.benchmark}@{corpus}") if several else score
