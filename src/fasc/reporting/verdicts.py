"""The paper's claims beside what was measured, as a page made from the results of ``recipes/paper.toml``."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fasc.outputs import MARKDOWN_HEAD
from fasc.reporting.claims import JUDGES, Verdict
from fasc.reporting.paper_figures import paper_figures
from fasc.reporting.paper_results import Results

FIGURES = "figures"


def verdict_page(folder: Path, made: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The page in Markdown, and what it was made from; draws the paper's figures into the folder ``figures``.

    Args:
        folder: of the results, one folder for each table.
        made: provenance.
    """
    results = Results(folder)
    found: list[Verdict] = []
    missing: list[str] = []
    for judged in JUDGES:
        try:
            found.append(judged(results))
        except (KeyError, FileNotFoundError, ValueError, IndexError, ZeroDivisionError) as problem:
            missing.append(f"{(judged.__doc__ or '').strip()} No result: {problem}.")
    lines = [
        MARKDOWN_HEAD,
        "# The paper's claims, one by one",
        "",
        "This page is written by `fasc run recipes/paper.toml` from its results; nobody edits it. Intervals are 95 %.",
        "",
        "| where | the paper says | its number | measured | how it differs | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for one in found:
        cells = (one.where, one.claim, one.paper, one.ours, one.protocol, f"**{one.verdict}**: {one.reason}")
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    if missing:
        lines += ["", "Without a result in this run:", "", *(f"- {text}" for text in missing)]
    lines += ["", *results.tables()]
    for title, file in paper_figures(results, folder / FIGURES).items():
        lines += [f"## {title}", "", f"![{title}]({FIGURES}/{file.name})", ""]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    command = " ".join(made["command"])
    lines += ["", f"Written by `{command}` with {versions}. Machines of the parts:", ""]
    lines += [*(f"- {table}: {'; '.join(machines)}" for table, machines in results.machines().items()), ""]
    return "\n".join(lines), {
        "verdicts": [asdict(one) for one in found],
        "missing": missing,
        "tables": results.numbers(),
        "provenance": dict(made),
    }
