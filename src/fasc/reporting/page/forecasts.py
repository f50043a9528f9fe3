"""How well a forecast predicted what was measured, one point for each group and rank."""

from collections.abc import Mapping
from typing import Any

from fasc.reporting.page.vega import Chart, colour_scale, colours_of, tooltips


def forecast_chart(validation: Mapping[str, Any]) -> Chart | None:
    """Measured KL against ½J on logarithmic axes; none if nothing positive was measured."""
    rows = [
        {
            "method": row["method"],
            "group": row["group"],
            "fraction": row["rank_fraction"],
            "forecast": row["half_j"],
            "kl": row["kl"],
            "words": f"{row['group']}, {row['method']} at rank fraction {row['rank_fraction']:g}: forecast {row['half_j']:.3g}, "
            f"measured {row['kl']:.3g} nats",
        }
        for row in validation["rows"]
        if row["half_j"] > 0 and row["kl"] > 0
    ]
    if not rows:
        return None
    colours = colours_of([row["method"] for row in rows])
    every = [row[key] for row in rows for key in ("forecast", "kl")]
    x = {"field": "forecast", "type": "quantitative", "title": "forecast ½J, nats per token", "scale": {"type": "log"}}
    y = {"field": "kl", "type": "quantitative", "title": "measured KL", "scale": {"type": "log"}}
    names = {"group": "group", "method": "method", "fraction": "rank fraction", "forecast": "½J", "kl": "KL"}
    tooltip = tooltips(names)
    for one in tooltip[3:]:
        one["format"] = ".3g"
    points = {"x": x, "y": y, "tooltip": tooltip, "description": {"field": "words"}}
    points["color"] = {"field": "method", "type": "nominal", "title": None, "scale": colour_scale(colours)}
    line = {"type": "line", "color": "#7d8590", "strokeDash": [4, 3], "aria": False}
    ends = [{"forecast": value, "kl": value} for value in (min(every), max(every))]
    return Chart(
        name="forecast-and-measured",
        title="Forecast and measured loss",
        words=f"Scatter plot of the measured KL divergence against the forecast ½J for {len(rows)} compressions of single "
        "groups; on the line both are equal.",
        spec={
            "height": 320,
            "data": {"values": rows},
            "layer": [
                {"data": {"values": ends}, "mark": line, "encoding": {"x": x, "y": y}},
                {"mark": {"type": "point", "filled": True, "size": 45, "opacity": 0.75}, "encoding": points},
            ],
        },
        swatches=tuple(colours.items()),
    )
