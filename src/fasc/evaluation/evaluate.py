"""Score a model on the chosen benchmarks."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import UsageError
from fasc.evaluation.files import benchmark_file
from fasc.evaluation.kept import KeptScores
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome, Outcomes
from fasc.evaluation.registry import Benchmark, Subject, WindowScores, get_benchmark
from fasc.evaluation.score import Score
from fasc.evaluation.text import evaluation_texts
from fasc.model.load import model_fingerprint
from fasc.model.scopes import evaluating
from fasc.processes import current
from fasc.progress import say
from fasc.provenance import versions
from fasc.text.corpus import TokenBlock


@dataclass(frozen=True, slots=True)
class Record:
    """What is known before an evaluation, and kept after it beside the scores."""

    seen: Collection[str] = ()
    """Digests of the texts that the model was made with; evaluating on one prints a warning."""

    keep: bool = True
    """Whether to look into the cache for scores of the same weights, and to keep these there."""

    outcomes: Outcomes = field(default_factory=dict)
    """Filled with what the model made of each item."""

    model: dict[str, Any] = field(default_factory=dict)
    """Filled, where a checkpoint is scored, with which it is: its name, the fingerprint of its weights, what it was made from."""

    contamination: dict[str, dict[str, int]] = field(default_factory=dict)
    """Filled with how many items of each benchmark stand in the calibration text, where that was looked for."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluationConfig,
    *,
    dense: PreTrainedModel | None = None,
    texts: Sequence[TokenBlock] | None = None,
    record: Record | None = None,
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
        record: what is known beforehand and kept afterwards, beside the scores.

    Raises:
        UnknownNameError: a benchmark that does not exist; nothing is run then.
        UsageError: a benchmark needs the dense model.
        CorpusError: a benchmark's file is not there; nothing is run then.
        NonFiniteError: a model produced NaN or infinity; names the batch.
    """
    record = record or Record(keep=False)
    benchmarks = [get_benchmark(name) for name in config.benchmarks]
    _require_what_they_need(benchmarks, config, dense)
    needs_text = any(benchmark.needs_text for benchmark in benchmarks)
    if texts is None:
        texts = evaluation_texts(model if dense is None else dense, tokenizer, config) if needs_text else []
    _require_same(model, config, texts)
    for corpus in [text.corpus for text in texts if text.text_digest in record.seen]:
        say(f"warning: `{corpus}` is the text this model was calibrated on; its scores will flatter it")
    scores: list[Score] = []
    compared = dense if any(benchmark.needs_dense for benchmark in benchmarks) else None
    passes: dict[str, dict[str, WindowScores]] = {text.corpus: {} for text in texts}
    kept = KeptScores(model, compared) if record.keep and current().count == 1 else None
    with evaluating(model) if compared is None else evaluating(model, compared):
        for benchmark in benchmarks:
            for text in texts if benchmark.needs_text else (None,):
                subject = Subject(model, tokenizer, compared, text, None if text is None else passes[text.corpus], {})
                measured, answered = _measured(benchmark, subject, config, kept)
                name = benchmark.name if text is None or len(texts) == 1 else f"{benchmark.name}@{text.corpus}"
                scores += [replace(one, benchmark=name) for one in measured]
                if answered:
                    record.outcomes[name] = answered
    return scores


def _require_what_they_need(benchmarks: Sequence[Benchmark], config: EvaluationConfig, dense: PreTrainedModel | None) -> None:
    for benchmark in benchmarks:
        if benchmark.needs_dense and dense is None:
            raise UsageError(f"`{benchmark.name}` compares with the dense model and none is known", "pass --dense MODEL")
        for file in benchmark.files:
            benchmark_file(benchmark.name, file, config)


def _measured(
    benchmark: Benchmark, subject: Subject, config: EvaluationConfig, kept: KeptScores | None
) -> tuple[list[Score], list[Outcome]]:
    """Scores and outcomes of one benchmark, from the cache where they are there."""
    known = benchmark.contents is None or benchmark.contents(config) is not None
    key = kept.key(benchmark, config, subject.text) if kept is not None and known else None
    if kept is not None and key is not None and (found := kept.read(key)) is not None:
        say(f"{benchmark.name}: kept from an earlier evaluation of the same weights")
        return found
    measured = list(benchmark.measure(subject, config))
    answered = (subject.outcomes or {}).get(benchmark.name, [])
    if kept is not None and key is not None:
        kept.write(key, measured, answered)
    return measured, answered


def _require_same(model: PreTrainedModel, config: EvaluationConfig, texts: Sequence[TokenBlock]) -> None:
    """See that all processes score the same model on the same texts, where there are several."""
    if current().count > 1:
        same = {"model": model_fingerprint(model), "text": " ".join(text.text_digest for text in texts)}
        same |= {name: str(value) for name, value in config.model_dump(exclude={"data_dir"}).items()}
        current().require_same(versions() | same)
        for text in texts:
            current().batches(len(text.tokens), 1)  # refuses more processes than windows
