"""Write a report: the page, the same as Markdown, and its plots as SVG and PNG."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fasc.errors import StorageError, UsageError
from fasc.outputs import is_ours, require_output
from fasc.reporting.page.bars import bars, facets_of
from fasc.reporting.page.cells import fields_of
from fasc.reporting.page.heatmap import heatmap
from fasc.reporting.page.page import page_of, title_for
from fasc.reporting.page.pareto import pareto_charts
from fasc.reporting.page.rows import highlights, models_of
from fasc.reporting.page.sources import Source, dense_source, read_source
from fasc.reporting.page.vega import Chart, library, save_chart
from fasc.reporting.report import Made, write_markdown
from fasc.serving.checkpoint import PLAN_FILE, PROVENANCE_FILE, RECIPE_FILE
from fasc.storage import expanded, new_file

PAGE, MARKDOWN, FIGURES = "report.html", "report.md", "figures"


def report(*runs: str | Path, out: str | Path | None = None, dense: str | Path | None = None) -> Path:
    """Compare all models of some runs and checkpoints, in one page that opens from the disk.

    Writes ``report.html``, ``report.md`` and ``figures/`` with every plot as SVG and PNG.

    Args:
        *runs: folders that ``fasc run`` or ``fasc compress`` left. A checkpoint's scores, speed, diagnosis and validation
            lie beside it, named like ``small.scores.json`` for the folder ``small``.
        dense: file of the dense model's scores (``fasc evaluate DENSE --json``), for checkpoints that stand without it.
        out: the report's folder; by default that of the run if it is one run, ``fasc-report`` otherwise.

    Returns:
        The path of the page.

    Raises:
        StorageError: a folder is no run and no checkpoint, or a file is damaged; or ``out`` holds something else.
        UsageError: nothing is named, or the plotting library is not installed.
    """
    if not runs:
        raise UsageError("no run is named", "name folders that `fasc run` or `fasc compress` wrote")
    folders = list(dict.fromkeys(expanded(run) for run in runs))
    library()
    read = [read_source(folder) for folder in folders]
    sources = distinct(read if dense is None else [dense_source(dense, read), *read])
    target = _place(folders, out)
    charts = _drawn(sources)
    page = page_of(sources)
    own = target / FIGURES / "report"
    _remove_old(target)
    figures = [(chart.title, save_chart(chart, own)[0].relative_to(target).as_posix()) for chart in charts]
    entries = [model.results for model in models_of(sources)]
    made = [_made(source, several=len(sources) > 1) for source in sources]
    write_markdown(target / MARKDOWN, title_for(sources), entries, figures, made)
    return _write(target / PAGE, page)


def _made(source: Source, *, several: bool) -> Made:
    name = source.name if several else ""
    ours = any(model.plan is not None and model.run == model.name for model in source.models)  # a checkpoint
    return Made(name, source.provenance, RECIPE_FILE, PROVENANCE_FILE) if ours else Made(name, source.provenance)


def write_page(path: Path, sources: Sequence[Source]) -> Path:
    """One page of results that are at hand; the file may replace one of ours.

    Raises:
        StorageError: it cannot be written.
        UsageError: the plotting library is not installed.
    """
    return _write(path, page_of(sources))


def distinct(sources: Sequence[Source]) -> list[Source]:
    """The same, folders of one name told apart by a number."""
    found: list[Source] = []
    for source in sources:
        names = {one.name for one in found}
        name, number = source.name, 2
        while name in names:
            name, number = f"{source.name} ({number})", number + 1
        found.append(replace(source, name=name, models=tuple(replace(model, run=name) for model in source.models)))
    return found


def _place(folders: Sequence[Path], out: str | Path | None) -> Path:
    """Where the report goes: a folder of a run or of a report of ours, or one that holds nothing.

    Raises:
        StorageError: it holds something else.
    """
    runs = [folder for folder in folders if not (folder / PLAN_FILE).is_file()]
    default = folders[0] if len(folders) == len(runs) == 1 else Path("fasc-report")
    target = require_output(default if out is None else out, overwrite=True, folder=True)
    own = is_ours(target / PAGE) or any(target.exists() and target.samefile(folder) for folder in runs)
    if target.exists() and any(target.iterdir()) and not own:
        raise StorageError(f"`{target}` already exists and holds no report of fasc", "choose another --out")
    for file in (target / PAGE, target / MARKDOWN):
        if file.exists() and not is_ours(file):
            raise StorageError(f"`{file}` already exists and was not written by fasc", "choose another --out")
    model = next((parent for parent in target.parents if (parent / "config.json").is_file()), None)
    if model is not None:
        raise StorageError(f"`{target}` lies inside the model `{model}`", "choose another --out")
    return target


def _remove_old(target: Path) -> None:
    """The figures that an earlier report names, and no other file."""
    if not (target / MARKDOWN).is_file():
        return
    for place in re.findall(rf"\]\(({FIGURES}/report/[^)/]+)\.svg\)", (target / MARKDOWN).read_text(encoding="utf-8")):
        for ending in (".svg", ".png"):
            (target / f"{place}{ending}").unlink(missing_ok=True)


def _drawn(sources: Sequence[Source]) -> list[Chart]:
    """What is saved as files: all of loss against size, and the heat maps of the models that are spoken of first."""
    models = models_of(sources)
    first = highlights(models)
    charts = [chart for pair in pareto_charts(models).values() for chart in pair]
    charts += [bars(models, first, benchmark, facet) for benchmark, facet in facets_of(models)]
    shown = {source.name for source in sources} | {model.name for model in first}
    for field in fields_of(sources, models):
        charts += [heatmap(field, cells, subject) for subject, cells in field.subjects.items() if subject in shown]
    return _apart(charts)


def _apart(charts: Sequence[Chart]) -> list[Chart]:
    """Charts with a file each: names that differ in signs alone get a number."""
    names: list[str] = []
    for chart in charts:
        place, number = chart.name, 2
        while place.casefold() in names:
            place, number = f"{chart.name}-{number}", number + 1
        names.append(place.casefold())
    ends = [name[len(chart.name) :] for name, chart in zip(names, charts, strict=True)]
    return [replace(chart, name=f"{chart.name}{end}") for chart, end in zip(charts, ends, strict=True)]


def _write(path: Path, page: str) -> Path:
    with new_file(path) as scratch:
        scratch.write_text(page, encoding="utf-8")
    return path
