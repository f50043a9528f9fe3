"""Models → what each kept of another, item by item."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from fasc.errors import UsageError
from fasc.evaluation.commonness import commonness
from fasc.evaluation.compared import Compared
from fasc.evaluation.evaluate import Record
from fasc.evaluation.evaluate import evaluate as score
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcome, Outcomes
from fasc.evaluation.paired import by_group, paired
from fasc.evaluation.registry import get_benchmark
from fasc.evaluation.score import FEW, Score
from fasc.evaluation.text import evaluation_texts
from fasc.model.load import LoadedModel, require_same_tokenizer
from fasc.model.options import ModelConfig
from fasc.progress import say
from fasc.stages.compress import load
from fasc.stages.evaluate import dense_config, texts_seen
from fasc.text.corpus import TokenBlock

_BINS = 4
"""Bins of how common subjects are."""


def compare(
    models: Sequence[str], config: EvaluationConfig, source: ModelConfig | None = None, *, dense: str | None = None
) -> Compared:
    """Score models on the same items and compare them pairwise.

    Args:
        models: checkpoints; without ``dense`` the first is what the others are compared with.
        config: benchmarks, limits, text.
        source: device and precision.
        dense: the model that the others were made from.

    Raises:
        UsageError: fewer than two models, two of one name, or tokenizers that split text differently.
    """
    source = source or ModelConfig()
    names = tuple(([dense] if dense is not None else []) + list(models))
    if len(names) < 2:
        raise UsageError("there is one model, and nothing to compare it with", "name another checkpoint, or pass --dense MODEL")
    places = [str(Path(name).expanduser().resolve()) if Path(name).expanduser().exists() else name for name in names]
    twice = next((name for name, place in zip(names, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise UsageError(f"`{twice}` is named twice", "name each model once")
    require_same_tokenizer(names)
    reference = load(source.model_copy(update={"model": names[0]}))
    benchmarks = [get_benchmark(name) for name in config.benchmarks]
    texts = evaluation_texts(*reference, config) if any(one.needs_text for one in benchmarks) else []
    scores: dict[str, list[Score]] = {}
    outcomes: dict[str, Outcomes] = {}
    for name in names:
        scores[name], outcomes[name] = _scored(source, name, config, texts, reference, first=name == names[0])
    pairs, groups = [], []
    for benchmark in outcomes[names[-1]]:
        against = [(name, names[0]) for name in names[1:]] + list(combinations(names[1:], 2))
        for model, other in against:
            if benchmark in outcomes[other]:
                pairs.append(paired(benchmark, (model, other), outcomes[model][benchmark], outcomes[other][benchmark]))
        if benchmark in outcomes[names[0]]:
            groups += _grouped(benchmark, names, outcomes, reference, config)
    return Compared(names, scores, pairs, groups)


def _scored(
    source: ModelConfig, name: str, config: EvaluationConfig, texts: list[TokenBlock], reference: LoadedModel, *, first: bool
) -> tuple[list[Score], Outcomes]:
    """Of one model, which is loaded here, so that it is gone before the next one is."""
    if first:  # the divergence of a model from itself is zero
        config = dense_config(config)
    if config.benchmarks:
        say(f"scoring {name}")
    loaded = reference if first else load(source.model_copy(update={"model": name}))
    record = Record(texts_seen(Path(name).expanduser()))
    dense = None if first else reference.model
    return score(loaded.model, loaded.tokenizer, config, dense=dense, texts=texts, record=record), record.outcomes


def _grouped(
    benchmark: str, names: tuple[str, ...], outcomes: dict[str, Outcomes], reference: LoadedModel, config: EvaluationConfig
) -> list[dict[str, Any]]:
    """Each model against the reference, by type and by how common the subject is."""
    first = outcomes[names[0]][benchmark]
    kinds = {"type": by_group(first, "type")} if len({one.type for one in first}) > 1 else {}
    if all(one.subject for one in first) and get_benchmark(benchmark).about_names:
        kinds["subject"] = _bins(first, reference, benchmark, config)
    rows = []
    for kind, members in kinds.items():
        for group, indices in members.items():
            if len(indices) < FEW:
                continue
            for name in names[1:]:
                some = [_take(outcomes[which][benchmark], indices) for which in (name, names[0])]
                rows.append({"kind": kind, "group": group} | paired(benchmark, (name, names[0]), *some).to_dict())
    return rows


def _bins(outcomes: list[Outcome], reference: LoadedModel, benchmark: str, config: EvaluationConfig) -> dict[str, list[int]]:
    """Items in equal bins, from the subjects that the reference holds for most probable to the least."""
    known = commonness(reference, [one.subject for one in outcomes], benchmark, config.batch_tokens)
    order = sorted(range(len(outcomes)), key=lambda index: -known[index])
    size = -(-len(order) // _BINS)
    words = ("most common", "common", "rare", "rarest")
    return {words[number]: sorted(order[number * size : (number + 1) * size]) for number in range(_BINS)}


def _take(outcomes: list[Outcome], indices: list[int]) -> list[Outcome]:
    return [outcomes[index] for index in indices]
