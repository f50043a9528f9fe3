"""What is lost against what is saved: KL and every benchmark against bytes and multiply-adds."""

from collections.abc import Mapping, Sequence
from math import floor, log10
from typing import Any

from fasc.reporting.entries import benchmarks_of
from fasc.reporting.page.comparison import score_cell, score_column
from fasc.reporting.page.sources import Model
from fasc.reporting.page.vega import Chart, colour_scale, colours_of
from fasc.reporting.table import is_share

_FEW = 8
"""So many points have their names beside them."""

_HEIGHT = 300
_LOG = 8.0
"""Values that differ by more than this factor stand on a logarithmic axis, where less is better."""

COSTS = {
    "bytes": ("weights, MB", lambda model: None if model.bytes is None else model.bytes / 1e6),
    "multiply-adds": (
        "multiply-adds a token of the layers that may be compressed, millions",
        lambda model: None if model.multiply_adds is None else model.multiply_adds / 1e6,
    ),
}
"""Name of each axis, its title, and a model's place on it."""

Row = dict[str, Any]


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
    better = "more is better" if rising else "less is better"
    return Chart(
        name=f"{_file(benchmark)}-by-{cost}",
        title=f"{column.title} by {'size' if cost == 'bytes' else cost}",
        words=f"Scatter plot of {column.title} ({better}) against {COSTS[cost][0]}, a point for each of {len(rows)} models with its "
        f"95 % interval; the line joins the best ones. The comparison table holds the same numbers.",
        spec=_spec(rows, front_of(rows, rising=rising), column.plain, COSTS[cost][0], log=log),
        swatches=tuple(_colours(rows).items()),
    )


def _file(benchmark: str) -> str:
    return "".join(character if character.isalnum() or character in "-_" else "-" for character in benchmark)


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
        row |= {"value": scale * score["value"], "score": cell.plain, "n": score["n"], "weights": f"{size / 1e6:,.0f} MB"}
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


def _colours(rows: Sequence[Row]) -> dict[str, str]:
    return colours_of([row["series"] for row in rows])


def _spec(rows: list[Row], front: list[Row], title: str, cost: str, *, log: bool) -> dict[str, Any]:
    scale = {"type": "log"} if log else {"zero": False, "nice": True}
    low, high = span_of([row["cost"] for row in rows])
    domain = [low, high]
    x: dict[str, Any] = {"field": "cost", "type": "quantitative", "title": cost, "scale": {"domain": domain, "nice": False}}
    y = {"field": "value", "type": "quantitative", "title": title, "scale": scale, "axis": {"titleAnchor": "start"}}
    y["axis"] = {"titleAngle": 0, "titleAlign": "left", "titleAnchor": "end", "titleY": -8, "titleX": -30, "tickCount": 6}
    colour = {"field": "series", "type": "nominal", "title": None, "scale": colour_scale(_colours(rows))}
    runs = list(dict.fromkeys(row["run"] for row in rows))
    shape: dict[str, Any] = {"field": "run", "type": "nominal", "title": None, "scale": {"domain": runs}}
    names = {"model": "model", "score": title, "n": "n", "weights": "weights", "adds": "multiply-adds"}
    tooltip = [{"field": field, "title": words} for field, words in names.items()]
    points: dict[str, Any] = {"x": x, "y": y, "color": colour, "tooltip": tooltip, "description": {"field": "words"}}
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
    if len(rows) <= _FEW:
        half = (low + high) / 2
        for align, dx, side in (("left", 9, "<"), ("right", -9, ">=")):  # away from the edge
            layers.append(
                {
                    "transform": [{"filter": f"datum.cost {side} {half}"}],
                    "mark": {"type": "text", "align": align, "dx": dx, "dy": -9, "fontSize": 11, "aria": False},
                    "encoding": {"x": x, "y": y, "text": {"field": "model"}},
                }
            )
    return {"height": _HEIGHT, "data": {"values": rows}, "layer": layers, "padding": {"top": 18, "left": 5, "right": 5, "bottom": 5}}
