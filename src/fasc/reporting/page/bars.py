"""Parts of a benchmark, such as relations or types of them: a bar for each model, with its interval."""

from collections.abc import Mapping, Sequence
from typing import Any

from fasc.reporting.entries import benchmarks_of
from fasc.reporting.page.comparison import Cell, score_cell
from fasc.reporting.page.rows import series_colours
from fasc.reporting.page.sources import Model
from fasc.reporting.page.vega import Chart, colour_scale, colours_of, file_name, tooltips

FACETS = ("type", "relation", "language", "template", "popularity", "speech", "field")
"""What metrics such as ``accuracy/type=geographic`` may be parts by, the most telling first; others follow in their order."""

_MOST = 6
"""Models that are drawn; the table holds all."""

_BAR, _GAP = 11, 12
"""Height of a bar, and between two parts, in pixels."""


def facets_of(models: Sequence[Model]) -> list[tuple[str, str]]:
    """Benchmark and facet of all scores of parts, types before relations."""
    found: dict[tuple[str, str], None] = {}
    for model in models:
        for score in model.entry.scores:
            head, slash, part = str(score["metric"]).partition("/")
            if slash and "=" in part and head == "accuracy":
                found[str(score["benchmark"]), part.partition("=")[0]] = None
    known = {facet: place for place, facet in enumerate(FACETS)}
    order = benchmarks_of([model.entry for model in models])
    return sorted(found, key=lambda one: (order.index(one[0]), known.get(one[1], len(known))))


def parts_table(models: Sequence[Model], benchmark: str, facet: str) -> list[tuple[str, int, list[Cell]]]:
    """A row for each part: its name, n, and each model's score."""
    details = [model.entry.details(benchmark, f"accuracy/{facet}=") for model in models]
    parts = list(dict.fromkeys(part for one in details for part in one))
    return [
        (part, next(one[part]["n"] for one in details if part in one), [score_cell(one.get(part)) for one in details])
        for part in parts
    ]


def bars(models: Sequence[Model], first: Sequence[Model], benchmark: str, facet: str) -> Chart:
    """The dense model and those that are spoken of first.

    Args:
        models: all.
        first: the compressed ones to draw.
        benchmark: of the scores.
        facet: such as ``type``.
    """
    drawn = [*[model for model in models if model.is_dense][:1], *first][:_MOST]
    rows = [row for model in drawn for row in _rows(model, benchmark, facet)]
    series = series_colours(models)
    alone = len({model.series for model in drawn}) == len(drawn)
    colours = {model.name: series[model.series] for model in drawn} if alone else colours_of([model.name for model in drawn])
    parts = list(dict.fromkeys(row["part"] for row in rows))
    return Chart(
        name=file_name(f"{benchmark}-by-{facet}"),
        title=f"{benchmark} by {facet}",
        words=f"Bars of the right answers on {benchmark} in percent, with 95 % intervals, for each of {len(parts)} parts "
        f"by {facet} and each of {len(drawn)} models. The table below holds the values.",
        spec=_spec(rows, parts, colours, facet),
        swatches=tuple(colours.items()),
    )


def _rows(model: Model, benchmark: str, facet: str) -> list[dict[str, Any]]:
    rows = []
    for part, score in model.entry.details(benchmark, f"accuracy/{facet}=").items():
        cell = score_cell(score)
        low, high = (None if score[key] is None else 100 * score[key] for key in ("low", "high"))
        row = {"model": model.name, "part": part, "value": 100 * score["value"], "low": low, "high": high, "n": score["n"]}
        rows.append(row | {"score": cell.plain, "words": f"{part}, {model.name}: {cell.plain} % of {score['n']}"})
    return rows


def _spec(rows: Sequence[Mapping[str, Any]], parts: Sequence[str], colours: Mapping[str, str], facet: str) -> dict[str, Any]:
    y = {"field": "part", "type": "nominal", "title": None, "scale": {"domain": list(parts), "padding": 0.2}}
    offset = {"field": "model", "scale": {"domain": list(colours)}}
    colour = {"field": "model", "type": "nominal", "title": None, "scale": colour_scale(colours)}
    x = {"field": "value", "type": "quantitative", "title": "right answers, %", "scale": {"domainMin": 0, "nice": True}}
    names = {"part": facet, "model": "model", "score": "right, %", "n": "n"}
    ends = {"x": {"field": "low", "type": "quantitative"}, "x2": {"field": "high"}}
    return {
        "height": {"step": _BAR * len(colours) + _GAP, "for": "position"},
        "data": {"values": list(rows)},
        "encoding": {"y": y, "yOffset": offset},
        "layer": [
            {
                "mark": {"type": "bar", "height": {"band": 0.9}},
                "encoding": {"x": x, "color": colour, "tooltip": tooltips(names), "description": {"field": "words"}},
            },
            {
                "transform": [{"filter": "datum.low !== null && datum.high !== null"}],
                "mark": {"type": "rule", "strokeWidth": 1.2, "color": "#7d8590", "aria": False},
                "encoding": ends,
            },
        ],
    }
