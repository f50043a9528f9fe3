"""How fast the energy of a group falls with its rank, for any group that is asked for."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from fasc.reporting.page.sources import Source
from fasc.reporting.page.vega import Chart, colour_scale, colours_of

Curves = dict[str, dict[str, list[float]]]
"""By group and method: share of the energy lost at equally spaced rank fractions from 0 to 1."""


def spectra_of(source: Source) -> Curves:
    """Of a diagnosis; the experts of a block are one group, by their mean."""
    found: dict[str, dict[str, list[list[float]]]] = {}
    for row in (source.diagnosis or {"groups": ()})["groups"]:
        name = row["kind"] if row["block"] is None else f"block {row['block']}, {row['kind']}"
        for method, values in row["methods"].items():
            found.setdefault(name, {}).setdefault(method, []).append(values["curve"])
    return {group: {method: _mean(curves) for method, curves in methods.items()} for group, methods in found.items()}


def _mean(curves: Sequence[Sequence[float]]) -> list[float]:
    return [float(f"{fmean(values):.3g}") for values in zip(*curves, strict=False)]


def curve_rows(methods: Mapping[str, Sequence[float]]) -> list[dict[str, Any]]:
    """The curves of one group as data of the plot."""
    return [
        {"method": method, "rank": place / (len(curve) - 1), "lost": lost}
        for method, curve in methods.items()
        for place, lost in enumerate(curve)
    ]


def spectrum(curves: Curves, group: str) -> Chart:
    """The curves of a group; the page fills in those of others."""
    methods = list(dict.fromkeys(method for one in curves.values() for method in one))
    colours = colours_of(methods)
    percent = {"format": "~%"}
    tooltip = [
        {"field": "method"},
        {"field": "rank", "title": "rank fraction", "format": ".0%"},
        {"field": "lost", "title": "energy lost", "format": ".2%"},
    ]
    encoding = {
        "x": {"field": "rank", "type": "quantitative", "title": "rank kept ÷ full rank", "axis": percent},
        "y": {"field": "lost", "type": "quantitative", "title": "energy lost", "axis": percent, "scale": {"domain": [0, 1]}},
        "color": {"field": "method", "type": "nominal", "title": None, "scale": colour_scale(colours)},
        "tooltip": tooltip,
    }
    return Chart(
        name="spectrum",
        title=f"Energy lost by rank: {group}",
        words="Lines of the share of the energy that is lost at each rank fraction, one for each method, for the chosen group.",
        spec={
            "height": 260,
            "data": {"name": "curves", "values": curve_rows(curves[group])},
            "layer": [
                {
                    "mark": {"type": "line", "strokeWidth": 2, "aria": False},
                    "encoding": {k: v for k, v in encoding.items() if k != "tooltip"},
                },
                {"mark": {"type": "point", "filled": True, "size": 30, "opacity": 0.9}, "encoding": encoding},
            ],
        },
        swatches=tuple(colours.items()),
    )
