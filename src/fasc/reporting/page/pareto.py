"""What is lost against what is saved: KL and every benchmark against bytes and multiply-adds."""

from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any, NamedTuple

from fasc.reporting.entries import benchmarks_of
from fasc.reporting.page.comparison import megabytes, score_cell, score_column
from fasc.reporting.page.rows import series_colours
from fasc.reporting.page.sources import Model
from fasc.reporting.page.vega import GREY, Chart, colour_scale, file_name, tooltips
from fasc.reporting.table import is_share

_FEW = 8
"""So many points have their names beside them."""

_HEIGHT = 300
_LOG = 8.0
"""Values that differ by more than this factor stand on a logarithmic axis, where less is better."""

COSTS = {
    "bytes": ("weights, MB", lambda model: None if model.bytes is None else model.bytes / 1e6),
    "multiply-adds": (  # of the layers that a plan may touch
        "multiply-adds a token, millions",
        lambda model: None if model.multiply_adds is None else model.multiply_adds / 1e6,
    ),
}
"""Name of each axis, its title, and a model's place on it."""

SHAPES = {"circle": "●", "square": "■", "triangle-up": "▲", "diamond": "◆", "triangle-down": "▼", "cross": "✚"}
"""Of the points of each run, in order."""

Row = dict[str, Any]


def shapes_of(models: Sequence[Model]) -> list[tuple[str, str]]:
    """A sign and the run that it stands for, where there are several."""
    runs = list(dict.fromkeys(model.run for model in models))
    signs = list(SHAPES.values())
    return [(signs[place % len(signs)], run) for place, run in enumerate(runs)] if len(runs) > 1 else []


def pareto_charts(models: Sequence[Model]) -> dict[str, list[Chart]]:
    """By measure, KL first: a chart for bytes and one for multiply-adds, where a compressed model has both."""
    benchmarks = sorted(benchmarks_of([model.entry for model in models]), key=lambda name: not name.startswith("kl"))
    found: dict[str, list[Chart]] = {}
    for benchmark in benchmarks:
        charts = [chart for cost in COSTS if (chart := _chart(models, benchmark, cost)) is not None]
        if charts:
            found[score_column(benchmark, models).plain] = charts
    return found


def _chart(models: Sequence[Model], benchmark: str, cost: str) -> Chart | None:
    rows = _rows(models, benchmark, cost)
    if not any(row["series"] != "dense" for row in rows):
        return None
    column = score_column(benchmark, models)
    rising = column.better == "↑"
    values = [row["value"] for row in rows]
    log = not rising and min(values) > 0 and max(values) > _LOG * min(values)
    if log:
        least = 10 ** floor(log10(min(values)))
        rows = [{**row, "low": None if row["low"] is None else max(row["low"], least)} for row in rows]
    shown = {row["series"] for row in rows}
    colours = {series: colour for series, colour in series_colours(models).items() if series in shown}
    runs = list(dict.fromkeys(model.run for model in models))
    dense = None if "dense" in shown else _dense_place(models, cost)
    better = "more is better" if rising else "less is better"
    return Chart(
        name=f"{file_name(benchmark)}-by-{cost}",
        title=f"{column.title} by {'size' if cost == 'bytes' else cost}",
        words=f"Scatter plot of {column.title} ({better}) against {COSTS[cost][0]}, a point for each of {len(rows)} models "
        "with its 95 % interval; the line joins the best ones. The comparison table holds the same numbers.",
        spec=_spec(_Drawing(rows, front_of(rows, rising=rising), colours, runs, dense, log=log), column.plain, COSTS[cost][0]),
        swatches=tuple(colours.items()),
    )


def _rows(models: Sequence[Model], benchmark: str, cost: str) -> list[Row]:
    rows = []
    for model in models:
        score, place = model.entry.score(benchmark), COSTS[cost][1](model)
        if score is None or place is None:
            continue
        scale = 100.0 if is_share(score) else 1.0
        low, high = (None if score[key] is None else scale * score[key] for key in ("low", "high"))
        cell, size = score_cell(score), model.bytes or 0
        row = {"model": model.name, "series": model.series, "run": model.run, "cost": place, "low": low, "high": high}
        row |= {"value": scale * score["value"], "score": cell.plain, "n": score["n"], "weights": f"{megabytes(size)} MB"}
        row["adds"] = f"{(model.multiply_adds or 0) / 1e6:,.1f} M"
        row["words"] = f"{model.name}: {benchmark} {cell.plain}, {row['weights']}, {row['adds']} multiply-adds"
        rows.append(row)
    return rows


def front_of(rows: Sequence[Mapping[str, Any]], *, rising: bool) -> list[Row]:
    """The rows that none beats in both, by cost."""
    front: list[Row] = []
    for row in sorted(rows, key=lambda row: (row["cost"], -row["value"] if rising else row["value"])):
        if not front or (row["value"] > front[-1]["value"] if rising else row["value"] < front[-1]["value"]):
            front.append(dict(row))
    return front


def span_of(costs: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis: some room beside the points, and never so little that equal sizes look different."""
    least, most = min(costs), max(costs)
    room = max(0.08 * (most - least), 0.05 * most)
    return max(0.0, least - room), most + room


def _dense_place(models: Sequence[Model], cost: str) -> float | None:
    """Where the dense model lies, if there is one: a benchmark such as KL that it is no part of shows it as a line."""
    places = {place for model in models if model.dense_bytes and (place := COSTS[cost][1](model.as_dense())) is not None}
    return places.pop() if len(places) == 1 else None


class _Drawing(NamedTuple):
    """What is drawn."""

    rows: list[Row]
    front: list[Row]
    colours: Mapping[str, str]
    runs: list[str]
    dense: float | None
    log: bool


def _spec(drawing: _Drawing, title: str, cost: str) -> dict[str, Any]:
    rows, front, colours, runs, dense, log = drawing
    scale = {"type": "log"} if log else {"zero": False, "nice": True}
    low, high = span_of([row["cost"] for row in rows] + ([] if dense is None else [dense]))
    domain = [low, high]
    x: dict[str, Any] = {"field": "cost", "type": "quantitative", "title": cost, "scale": {"domain": domain, "nice": False}}
    above = {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleY": -8, "titleX": -30, "tickCount": 6}
    y = {"field": "value", "type": "quantitative", "title": title, "scale": scale, "axis": above}
    colour = {"field": "series", "type": "nominal", "title": None, "scale": colour_scale(colours)}
    signs, here = list(SHAPES), {row["run"] for row in rows}
    signed = {run: signs[place % len(signs)] for place, run in enumerate(runs) if run in here}  # the same sign in every plot
    forms = {"domain": list(signed), "range": list(signed.values())}
    shape: dict[str, Any] = {"field": "run", "type": "nominal", "title": None, "scale": forms}
    names = {"model": "model", "score": title, "n": "n", "weights": "weights", "adds": "multiply-adds"}
    points: dict[str, Any] = {"x": x, "y": y, "color": colour, "tooltip": tooltips(names), "description": {"field": "words"}}
    if len(runs) > 1:
        points["shape"] = shape
    layers: list[dict[str, Any]] = [
        {
            "data": {"values": front},
            "mark": {"type": "line", "interpolate": "step-after", "color": "#7d8590", "strokeDash": [4, 3], "aria": False},
            "encoding": {"x": x, "y": y},
        },
        {
            "mark": {"type": "rule", "strokeWidth": 1.5, "opacity": 0.6, "aria": False},
            "encoding": {"x": x, "y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}, "color": colour},
            "transform": [{"filter": "datum.low !== null && datum.high !== null"}],
        },
        {"mark": {"type": "point", "filled": True, "size": 110, "opacity": 1}, "encoding": points},
    ]
    if dense is not None:
        at = {"data": {"values": [{"cost": dense, "model": "dense"}]}, "encoding": {"x": x}}
        label = {"type": "text", "align": "right", "dx": -5, "dy": 8, "y": 0, "fontSize": 11, "aria": False}
        layers.append({**at, "mark": {"type": "rule", "color": GREY, "aria": False}})
        layers.append({**at, "mark": label, "encoding": {"x": x, "text": {"field": "model"}}})
    if len(rows) <= _FEW:
        layers += [
            {
                "data": {"values": beside},
                "mark": {"type": "text", "align": align, "dx": dx, "dy": -9, "fontSize": 11, "aria": False},
                "encoding": {"x": x, "y": y, "text": {"field": "model"}},
            }
            for align, dx, beside in _labels(rows, (low + high) / 2)
        ]
    return {
        "height": _HEIGHT,
        "data": {"values": rows},
        "layer": layers,
        "padding": {"top": 18, "left": 5, "right": 5, "bottom": 5},
    }


def _labels(rows: Sequence[Row], middle: float) -> list[tuple[str, int, list[Row]]]:
    """Alignment, distance and rows of the names, which stand away from the nearer edge."""
    left, right = [row for row in rows if row["cost"] < middle], [row for row in rows if row["cost"] >= middle]
    return [one for one in (("left", 9, left), ("right", -9, right)) if one[2]]
