"""Where in the model: block × kind, for whatever is known of each place."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from fasc.reporting.page.cells import Cell, Field
from fasc.reporting.page.vega import Chart, file_name, tooltips

_ROW = 26
"""Height of a row, in pixels."""

_TICKS = 16
_LOG = 30.0
"""Values that differ by more than this factor are coloured by their logarithm."""


def heatmap(field: Field, cells: Sequence[Cell], subject: str = "") -> Chart:
    """A rectangle for every place; the page fills in other subjects' cells of the same field.

    Args:
        field: what is shown.
        cells: of one subject, or none.
        subject: which.
    """
    rows = [as_row(cell, field) for cell in cells]
    return Chart(
        name=f"{field.name}-by-block" + (f"-{file_name(subject, also='.')}" if subject else ""),
        title=f"{field.title} by block" + (f": {subject}" if subject else ""),
        words=f"Heat map of {field.words}, by block and kind of layer. The table below holds the values.",
        spec=_spec(field, rows),
    )


def as_row(cell: Cell, field: Field) -> dict[str, Any]:
    """A cell as data of the plot."""
    block, kind, value, words = cell
    return {"block": block, "kind": kind, "value": value, "is": words, "words": f"block {block}, {kind}: {field.title} {words}"}


def _spec(field: Field, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    every = list(chain.from_iterable(field.subjects.values()))
    blocks = sorted({cell[0] for cell in every})
    kinds = list(dict.fromkeys(cell[1] for cell in every))
    step = max(1, -(-len(blocks) // _TICKS))
    legend = {"gradientLength": 220, "gradientThickness": 12, "title": field.words, "titleLimit": 400}
    return {
        "height": {"step": _ROW},
        "data": {"name": "cells", "values": list(rows)},
        "mark": {"type": "rect"},
        "encoding": {
            "x": {
                "field": "block",
                "type": "ordinal",
                "title": "block",
                "scale": {"domain": blocks, "paddingInner": 0.08},
                "axis": {"labelAngle": 0, "values": blocks[::step]},
            },
            "y": {"field": "kind", "type": "nominal", "title": None, "scale": {"domain": kinds, "paddingInner": 0.08}},
            "color": {"field": "value", "type": "quantitative", "scale": _colours(field, every), "legend": legend},
            "tooltip": tooltips({"block": "block", "kind": "kind", "is": field.title}),
            "description": {"field": "words"},
        },
    }


def _colours(field: Field, cells: Sequence[Cell]) -> dict[str, Any]:
    """Viridis: even in lightness, and readable without seeing its colours. Subjects share one scale."""
    values = [cell[2] for cell in cells]
    low, high = (0.0, 1.0) if field.share else (min(values), max(values))
    positive = [value for value in values if value > 0]
    if not field.share and positive and max(positive) > _LOG * min(positive):
        return {"type": "log", "scheme": "viridis", "domain": [min(positive), high], "clamp": True}
    return {"scheme": "viridis", "domain": [low, high if high > low else low + 1]}
