"""Checkpoints → scores and speed."""

from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fasc.errors import FascError, UsageError
from fasc.evaluation.contamination import contamination
from fasc.evaluation.evaluate import Record
from fasc.evaluation.evaluate import evaluate as score
from fasc.evaluation.options import EvaluationConfig, SpeedConfig
from fasc.evaluation.registry import get_benchmark
from fasc.evaluation.score import Score
from fasc.evaluation.speed import SpeedReport, compare_speed
from fasc.model.load import LoadedModel, model_fingerprint, require_same_tokenizer
from fasc.model.options import ModelConfig
from fasc.planning.options import BudgetConfig
from fasc.progress import say
from fasc.provenance import recoveries
from fasc.recipe import read_recipe
from fasc.serving.checkpoint import RECIPE_FILE, read_provenance
from fasc.stages.compress import Compressed, load
from fasc.stages.keywords import Corpus, Names, corpus_in, names_in, refuse_rest, take
from fasc.text.corpus import TextRequest, load_corpus


def evaluate(
    model: str | Path | PreTrainedModel | Compressed,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    benchmarks: Names | None = None,
    corpus: Corpus | None = None,
    dense: str | Path | PreTrainedModel | None = None,
    **options: Any,
) -> list[Score]:
    """Score a model, dense or compressed, with 95 % intervals.

    Args:
        model: a checkpoint, or a loaded model.
        tokenizer: of a loaded model.
        benchmarks: registered names.
        corpus: the text of ``perplexity`` and ``kl``; several are scored one by one.
        dense: the dense model, for ``kl``; by default what a checkpoint of ours says.
        **options: fields of ``EvaluationConfig`` (``limit=``, ``context=``, …), and ``device=``, ``device_map=``,
            ``dtype=``.

    Raises:
        UnknownNameError: no such benchmark or option.
        NonFiniteError: the model produced NaN or infinity.
    """
    named = None if corpus is None else corpus_in(corpus)
    config = take(EvaluationConfig, options, corpus=named, benchmarks=None if benchmarks is None else names_in(benchmarks))
    source = take(ModelConfig, {key: options.pop(key) for key in ("device", "device_map", "dtype") if key in options})
    refuse_rest(options, EvaluationConfig, ModelConfig)
    if isinstance(model, Compressed):
        model, tokenizer = model.model, tokenizer or model.tokenizer
    if isinstance(model, PreTrainedModel):
        if tokenizer is None:
            raise UsageError("there is no tokenizer to read the benchmarks with", "pass the model's tokenizer")
        reference = _loaded(dense, source)
        return list(score(model, tokenizer, config, dense=reference))
    return score_checkpoint(source.model_copy(update={"model": str(model)}), config, dense)


def _loaded(dense: str | Path | PreTrainedModel | None, source: ModelConfig) -> PreTrainedModel | None:
    if dense is None or isinstance(dense, PreTrainedModel):
        return dense
    return load(source.model_copy(update={"model": str(dense)})).model


def score_checkpoint(
    source: ModelConfig,
    config: EvaluationConfig,
    dense: str | Path | PreTrainedModel | None = None,
    record: Record | None = None,
) -> list[Score]:
    """Score a checkpoint; the dense model is loaded only if a benchmark needs it."""
    reference = dense or dense_of(source.model)
    alone = reference is None and "benchmarks" not in config.model_fields_set  # nobody has asked for kl
    config = dense_config(config) if alone else config
    wanted = [get_benchmark(name) for name in config.benchmarks]
    needed = any(one.needs_dense for one in wanted)
    if needed and reference is None:
        name = next(one.name for one in wanted if one.needs_dense)
        raise UsageError(
            f"`{name}` compares with a dense model, and `{source.model}` says of none that it was made from it",
            f"pass --dense MODEL for a compressed model; for a dense one leave `{name}` out",
        )
    if needed and isinstance(reference, (str, Path)):
        require_same_tokenizer([str(reference), source.model])
    loaded = load(source)
    if alone:
        say(f"kl is left out: `{source.model}` says of no model it was made from; --dense MODEL compares it with one")
    record = record or Record(texts_seen(source.model))
    record.model.update(name=source.model, fingerprint=model_fingerprint(loaded.model), made_from=dense_of(source.model))
    compared = _loaded(reference, source) if needed else None
    scores = list(score(loaded.model, loaded.tokenizer, config, dense=compared, record=record))
    record.contamination.update(look_for_items(source.model, loaded, record))
    return scores


def look_for_items(checkpoint: str | Path, loaded: LoadedModel, record: Record) -> dict[str, dict[str, int]]:
    """How many of the items that were asked stand in the text that a checkpoint of ours was calibrated on; warns of them.

    Nothing is found where the checkpoint does not say its text, or where that can no longer be read.
    """
    recipe = Path(checkpoint).expanduser() / RECIPE_FILE
    if not recipe.is_file() or not any(one.right is not None for some in record.outcomes.values() for one in some):
        return {}
    with suppress(FascError):
        calibration = read_recipe(recipe).calibration
        if calibration.corpus == "self":  # its own words
            return {}
        request = TextRequest(
            corpus=calibration.corpus,
            sequences=calibration.sequences,
            sequence_length=calibration.sequence_length,
            seed=calibration.seed,
            role="calibration",
            data_dir=calibration.data_dir,
        )
        text = "\n".join(loaded.tokenizer.batch_decode(load_corpus(*loaded, request).tokens))
        counts = contamination(text, record.outcomes)
        for benchmark, count in counts.items():
            if count["found"]:
                say(
                    f"warning: {count['found']} of {count['items']:,} items of `{benchmark}` stand in the text this model was "
                    "calibrated on"
                )
        return counts
    return {}


def bench(source: ModelConfig, config: SpeedConfig, dense: str | None = None) -> SpeedReport:
    """Time a checkpoint and its dense model in turn.

    Raises:
        UsageError: the checkpoint does not say what it was made from.
    """
    reference = dense or dense_of(source.model)
    if reference is None:
        raise UsageError(f"`{source.model}` does not say which model it was compressed from", "pass --dense MODEL")
    budget = budget_of(source.model)
    return compare_speed(
        source.model,
        reference,
        config,
        budget=budget,
        dtype=source.dtype,
        device=source.device,
        device_map=source.device_map,
    )


def dense_of(checkpoint: str | Path) -> str | None:
    """The model a checkpoint was compressed from, if it says so."""
    made = read_provenance(checkpoint)
    return None if made is None else made.get("model")


def budget_of(checkpoint: str | Path) -> BudgetConfig | None:
    """The budget a checkpoint was compressed under, if it says so in words that this version knows."""
    with suppress(UsageError):
        return read_recipe(Path(checkpoint) / RECIPE_FILE).budgets[0]
    return None


def texts_seen(checkpoint: str | Path) -> frozenset[str]:
    """Digests of the texts a checkpoint was calibrated and trained on, as far as it says so."""
    made = read_provenance(checkpoint) or {}
    digests = [part.get("text_digest") for part in (made.get("statistics", {}), *recoveries(made))]
    return frozenset(digest for digest in digests if digest)


def dense_config(config: EvaluationConfig) -> EvaluationConfig:
    """The benchmarks that make sense for the dense model itself."""
    names = tuple(name for name in config.benchmarks if not get_benchmark(name).needs_dense)
    return config.model_copy(update={"benchmarks": names})
