"""Vega-Lite: what charts look like, and how they become JavaScript, SVG and PNG. Nothing is fetched."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from fasc.errors import UsageError
from fasc.storage import new_file

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#b8860b", "#8172b3")
"""Okabe and Ito's, told apart by colour-blind people, without those that vanish on white or on black; then two more."""

GREY = "#7d8590"
"""Of the dense model."""

_INK, _PAPER = "#1b1f24", "#ffffff"

_WIDTH = 460
"""Of a saved chart, in pixels; on the page it is as wide as there is room."""


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot of the page."""

    name: str
    """Of its element and of its files."""

    title: str
    words: str
    """What it shows, for those who do not see it."""

    spec: Mapping[str, Any]
    """Vega-Lite, without a width."""

    swatches: Sequence[tuple[str, str]] = ()
    """Names and colours of a legend that the page writes itself, where it can break lines."""


def file_name(text: str, also: str = "") -> str:
    """A text as part of the name of an element and of a file: letters, digits, ``-``, ``_`` and what else is allowed."""
    return "".join(character if character.isalnum() or character in f"-_{also}" else "-" for character in text)


def tooltips(titles: Mapping[str, str]) -> list[dict[str, str]]:
    """What a point says when it is pointed at: field ↦ title."""
    return [{"field": field, "title": title} for field, title in titles.items()]


def colours_of(names: Sequence[str]) -> dict[str, str]:
    """A colour each, in order; the dense model is grey."""
    found: dict[str, str] = {}
    for name in names:
        if name not in found:
            used = sum(colour != GREY for colour in found.values())
            found[name] = GREY if name == "dense" or name.endswith(": dense") else COLOURS[used % len(COLOURS)]
    return found


def colour_scale(colours: Mapping[str, str]) -> dict[str, Any]:
    """Of a Vega-Lite encoding."""
    return {"domain": list(colours), "range": list(colours.values())}


def _config(ink: str, *, legends: bool) -> dict[str, Any]:
    words = {"labelColor": ink, "titleColor": ink, "labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    lines = {
        "domainColor": ink,
        "tickColor": ink,
        "gridColor": ink,
        "domainOpacity": 0.5,
        "tickOpacity": 0.5,
        "gridOpacity": 0.12,
    }
    return {
        "font": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif",
        "axis": {**words, **lines, "labelLimit": 220},
        "legend": {**words, "orient": "top", "labelLimit": 320} if legends else {"disable": True},
        "title": {"color": ink, "anchor": "start", "fontSize": 13},
        "header": {"labelColor": ink, "titleColor": ink},
        "text": {"color": ink},
        "view": {"stroke": None},
    }


def compiled(chart: Chart) -> dict[str, Any]:
    """Vega for the page: as wide as its element, in the colour of the text around it."""
    config = _config("currentColor", legends=not chart.swatches)
    autosize = {"type": "fit-x", "contains": "padding"}
    spec = {"width": "container", "autosize": autosize, "config": config, "background": None, **_named(chart)}
    return dict(library().vegalite_to_vega(spec))


def save_chart(chart: Chart, folder: Path) -> list[Path]:
    """Write ``NAME.svg`` and ``NAME.png`` for papers: black on white, with the legend inside.

    Raises:
        StorageError: they cannot be written.
    """
    base = {"width": _WIDTH, "background": _PAPER, "title": chart.title, "padding": 8}
    spec = {**base, "config": _config(_INK, legends=True), **_named(chart)}
    svg, png = folder / f"{chart.name}.svg", folder / f"{chart.name}.png"
    with new_file(svg) as scratch:
        scratch.write_text(library().vegalite_to_svg(spec), encoding="utf-8")
    with new_file(png) as scratch:
        scratch.write_bytes(library().vegalite_to_png(spec, scale=2))
    return [svg, png]


def _named(chart: Chart) -> dict[str, Any]:
    return {"description": chart.words, **json.loads(json.dumps(chart.spec, allow_nan=False))}


def library() -> ModuleType:
    """The package that draws.

    Raises:
        UsageError: it is not installed.
    """
    try:
        import vl_convert  # noqa: PLC0415 - an extra: only this report needs it
    except ImportError as problem:
        raise UsageError(
            "the report's plots need the package `vl-convert-python`, which is not installed", "pip install 'fasc[report]'"
        ) from problem
    return vl_convert


@cache
def runtime() -> str:
    """Vega as JavaScript that sets ``window.vegaEmbed``; it evaluates no strings."""
    return str(library().javascript_bundle("window.vegaEmbed = vegaEmbed;")).replace("</script", "<\\/script")
