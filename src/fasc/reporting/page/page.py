"""The page: what the sources hold, put into the template."""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from fasc.reporting.compared import NOTE, WORDS
from fasc.reporting.page.bars import bars, facets_of, parts_table
from fasc.reporting.page.cells import fields_of
from fasc.reporting.page.comparison import Cell, comparison_of, score_cell
from fasc.reporting.page.forecasts import forecast_chart
from fasc.reporting.page.heatmap import heatmap
from fasc.reporting.page.pareto import pareto_charts, shapes_of
from fasc.reporting.page.rows import highlights, models_of
from fasc.reporting.page.sources import Model, Source
from fasc.reporting.page.spectra import spectra_of, spectrum
from fasc.reporting.page.tables import compared_rows, plan_rows, summary_rows
from fasc.reporting.page.vega import Chart, compiled, runtime
from fasc.reporting.page.words import summary_of, title_of
from fasc.reporting.report import command_of, facts_of, protocols_of, samples_of

Context = dict[str, Any]


def page_of(sources: Sequence[Source]) -> str:
    """HTML that needs no other file and no network.

    Raises:
        UsageError: the plotting library is not installed.
    """
    models = models_of(sources)
    entries = [model.results for model in models]
    charts: list[Chart] = []
    payload: Context = {}
    parts: Context = {
        **_answers(sources, models),
        **_table(models),
        **_plots(sources, models, charts, payload),
        "kept": [table for source in sources if source.comparison is not None for table in compared_rows(source.comparison)],
        "kept_note": NOTE,
        "kept_words": WORDS,
        "samples": samples_of(entries),
        "speeds": [(model.name, row) for model in models for row in model.entry.speeds],
        "remarks": [remark for source in sources for remark in source.remarks],
        "forecasts": _forecasts(sources, charts),
        "protocols": protocols_of(entries),
        "made": [made_of(source) for source in sources],
    }
    payload["charts"] = {chart.name: compiled(chart) for chart in charts}
    return _template().render(
        **parts,
        sections=_sections(parts),
        models=models,
        several=len(sources) > 1,
        version=version("fasc"),
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        css=Markup(_file("page.css")),
        script=Markup(_file("page.js")),
        vega=Markup(runtime()),
        data=Markup(_embedded(payload)),
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return environment.from_string(_file("page.html.j2"))


def _file(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """JSON that may stand in a page: nothing in it can end the element it stands in."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


_SECTIONS = {
    "answers": ("summaries", "In plain words"),
    "compare": ("rows", "Comparison"),
    "kept": ("kept", "What was kept"),
    "trade": ("pareto", "Loss against size"),
    "where": ("fields", "Where"),
    "spectra": ("spectrum", "Spectra"),
    "parts": ("facets", "Kinds of facts"),
    "samples": ("samples", "Samples"),
    "speed": ("speeds", "Speed"),
    "forecast": ("forecasts", "Forecast"),
    "made": ("made", "How it was made"),
}
"""By element: the part that it shows, and its name in the list of sections."""


def _sections(parts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, words) for name, (part, words) in _SECTIONS.items() if parts[part]]


def title_for(sources: Sequence[Source]) -> str:
    """What the page is about: the dense models, or the sources where nobody knows them."""
    told = [str(source.provenance["model"]) for source in sources if source.provenance.get("model")]
    known = told or [source.name for source in sources]
    names = list(dict.fromkeys(Path(name).name if Path(name).is_absolute() else name for name in known))
    return f"What compression kept: {', '.join(names[:3])}{' and others' if len(names) > 3 else ''}"


def _answers(sources: Sequence[Source], models: Sequence[Model]) -> Context:
    first = highlights(models)
    compressed = sum(not model.is_dense for model in models)
    if not models:
        return {"title": ", ".join(source.name for source in sources), "lead": "", "summaries": [], "left_out": 0}
    return {
        "title": title_for(sources),
        "lead": title_of(first[0], models) if first else "The dense model alone.",
        "summaries": [summary_of(model, models) for model in first],
        "left_out": compressed if compressed > len(first) else 0,
    }


def _table(models: Sequence[Model]) -> Context:
    columns, rows = comparison_of(models)
    return {"columns": columns, "rows": rows, "others": other_scores(models)}


def other_scores(models: Sequence[Model]) -> list[tuple[str, list[Cell]]]:
    """Scores that are no column of the comparison and no part of a benchmark: tails, agreement."""
    found: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for model in models:
        for score in model.entry.scores:
            if "=" not in score["metric"] and score is not model.entry.score(score["benchmark"]):
                found.setdefault((score["benchmark"], score["metric"]), {})[model.name] = score
    return [
        (f"{benchmark}, {metric}", [score_cell(scores.get(model.name)) for model in models])
        for (benchmark, metric), scores in found.items()
    ]


def _plots(sources: Sequence[Source], models: Sequence[Model], charts: list[Chart], payload: Context) -> Context:
    """Sections with plots; what the page's script needs goes to ``charts`` and ``payload``."""
    pareto = pareto_charts(models)
    charts += [chart for pair in pareto.values() for chart in pair]
    fields = fields_of(sources, models)
    if fields:
        payload["fields"] = {
            field.name: {"title": field.title, "subjects": field.subjects, "spec": compiled(heatmap(field, ()))}
            for field in fields
        }
    curves = {source.name: found for source in sources if (found := spectra_of(source))}
    first = next(iter(curves.values()), None)
    chart = None if first is None else spectrum(first, next(iter(first)))
    if chart is not None:
        payload["spectra"] = curves
        charts.append(chart)
    facets = []
    for benchmark, facet in facets_of(models):
        bar = bars(models, highlights(models), benchmark, facet)
        charts.append(bar)
        facets.append({"name": facet, "chart": bar, "rows": parts_table(models, benchmark, facet)})
    return {
        "shapes": shapes_of(models),
        "pareto": pareto,
        "fields": fields,
        "spectrum": chart,
        "spectra_runs": list(curves),
        "facets": facets,
    }


def _forecasts(sources: Sequence[Source], charts: list[Chart]) -> list[Context]:
    found: list[Context] = []
    for source in sources:
        if source.validation is not None and not any(one["chart"] for one in found):
            chart = forecast_chart(source.validation)
            charts += [] if chart is None else [chart]
            found.append({"chart": chart, "tables": [summary_rows(source.validation), plan_rows(source.validation)]})
    return found


def made_of(source: Source) -> Context:
    """Command, versions, machine and digests of a source."""
    made = source.provenance
    return {"name": source.name, "command": command_of(made), "facts": facts_of(made), "recipe": source.recipe}
