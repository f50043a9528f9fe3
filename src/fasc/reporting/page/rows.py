"""The models of all runs of a report, each with a name of its own."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import inf
from typing import Any

from fasc.reporting.entries import benchmarks_of
from fasc.reporting.page.sources import Model, Source
from fasc.reporting.page.vega import colours_of
from fasc.reporting.table import base_name


def models_of(sources: Sequence[Source]) -> list[Model]:
    """Dense ones first; a dense model that several runs have scored alike is there once.

    With several runs each name says its run, where it would not be alone otherwise.
    """
    dense: list[Model] = []
    rest: list[Model] = []
    for source in sources:
        for model in source.models:
            (dense if model.is_dense else rest).append(model)
    alone = [one for index, one in enumerate(dense) if not any(_same(one, other) for other in dense[:index])]
    every = [*alone, *rest]
    counts = Counter(model.name for model in every)
    named = [_named(model, twice=counts[model.name] > 1) for model in every]
    seen: Counter[str] = Counter()
    for index, model in enumerate(named):
        seen[model.name] += 1
        if seen[model.name] > 1:
            named[index] = replace(model, name=f"{model.name} ({seen[model.name]})")
    return _measured_alike(named)


def _measured_alike(models: Sequence[Model]) -> list[Model]:
    """The same, with a benchmark's scores under names of their own where they are of other text, windows, items or protocol.

    Only what is measured alike may stand in a column and in a ratio.
    """
    ways: dict[str, list[tuple[str, int]]] = {}
    found = []
    for model in models:
        names: dict[str, str] = {}
        for benchmark in benchmarks_of([model.entry]):
            score = model.entry.score(benchmark)
            if score is not None:
                known, way = ways.setdefault(benchmark, []), (str(score["protocol"]), int(score["n"]))
                if way not in known:
                    known.append(way)
                number = known.index(way)
                names[benchmark] = f"{benchmark} ({number + 1})" if number else benchmark
        scores = [{**score, "benchmark": names.get(score["benchmark"], score["benchmark"])} for score in model.entry.scores]
        found.append(replace(model, entry=replace(model.entry, scores=scores)))
    return found


def _named(model: Model, *, twice: bool) -> Model:
    return replace(model, name=f"{model.run}: {model.name}") if twice else model


def _same(one: Model, other: Model) -> bool:
    return list(one.entry.scores) == list(other.entry.scores) and one.bytes == other.bytes


def dense_of(models: Sequence[Model], model: Model) -> Model | None:
    """The dense model beside one: that of its run, or the only one there is."""
    dense = [one for one in models if one.is_dense]
    own = next((one for one in dense if one.run == model.run), None)
    return own or (dense[0] if len(dense) == 1 and dense[0].bytes == model.dense_bytes else None)


def highlights(models: Sequence[Model], most: int = 3) -> list[Model]:
    """The compressed models to speak of first: all if they are few, else the closest, the smallest and the fastest."""
    compressed = [model for model in models if not model.is_dense]
    if len(compressed) <= most:
        return sorted(compressed, key=lambda model: (divergence_of(model) or {"value": inf})["value"])
    chosen: list[Model] = []
    if close := [model for model in compressed if divergence_of(model)]:
        chosen.append(min(close, key=lambda model: (divergence_of(model) or {"value": 0.0})["value"]))
    chosen.append(min(compressed, key=lambda model: model.bytes or 0))
    if timed := [model for model in compressed if model.entry.speed("decode")]:
        chosen.append(max(timed, key=lambda model: (model.entry.speed("decode") or (0.0,))[0]))
    return list({model.name: model for model in chosen}.values())


def divergence_of(model: Model) -> Mapping[str, Any] | None:
    """Its KL divergence from the dense model, on the first corpus."""
    return next((score for score in model.entry.scores if base_name(str(score["benchmark"])) == "kl"), None)


def series_colours(models: Sequence[Model]) -> dict[str, str]:
    """A colour for each method, the same in all plots."""
    return colours_of([model.series for model in models])
