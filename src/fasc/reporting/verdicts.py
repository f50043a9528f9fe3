"""The paper's claims beside what was measured, as a page made from the results of ``recipes/paper.toml``."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fasc.outputs import MARKDOWN_HEAD
from fasc.reporting.claims import JUDGES
from fasc.reporting.paper_figures import paper_figures
from fasc.reporting.paper_results import MISSING, Results

FIGURES = "figures"
_ROW = ("where", "claim", "paper", "ours", "protocol")


def gather(folder: Path, made: Mapping[str, Any], earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that the page says, as plain JSON values; draws the paper's figures into the folder ``figures``.

    Args:
        folder: of the results, one folder for each table.
        made: provenance.
        earlier: what this function gave before: what it says of parts that have no result in the folder is kept, and named.
    """
    results = Results(folder)
    before: Mapping[str, Any] = earlier or {
        "verdicts": {},
        "kept": {},
        "sections": {},
        "figures": {},
        "machines": {},
        "tables": {},
    }
    verdicts: dict[str, Any] = {}
    missing: dict[str, str] = {}
    kept: dict[str, str] = {}
    for judged in JUDGES:
        name = judged.__name__
        try:
            verdicts[name] = asdict(judged(results))
        except MISSING as problem:
            if name in before["verdicts"]:
                verdicts[name] = before["verdicts"][name]
                kept[name] = before["kept"].get(name, _told(before))
            else:
                missing[name] = f"{(judged.__doc__ or '').strip()} No result: {problem}."
    drawn = {title: file.name for title, file in paper_figures(results, folder / FIGURES).items()}
    tables = results.tables()
    standing = {title: name for title, name in before["figures"].items() if (folder / FIGURES / name).is_file()}
    return {
        "verdicts": verdicts,
        "missing": missing,
        "kept": kept,
        "sections": {**before["sections"], **tables},
        "kept_tables": sorted({*before["sections"], *standing} - {*tables, *drawn}),
        "figures": {**standing, **drawn},
        "machines": {**before["machines"], **results.machines()},
        "tables": {**before["tables"], **results.numbers()},
        "provenance": dict(made),
    }


def page(found: Mapping[str, Any]) -> str:
    """What was gathered, in Markdown."""
    lines = [
        MARKDOWN_HEAD,
        "# The paper's claims, one by one",
        "",
        "This page is written by `fasc run recipes/paper.toml` from its results; nobody edits it. Intervals are 95 %.",
        "",
        "| where | the paper says | its number | measured | how it differs | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for one in found["verdicts"].values():
        cells = (*(one[key] for key in _ROW), f"**{one['verdict']}**: {one['reason']}")
        lines.append("| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |")
    if found["missing"]:
        lines += ["", "Without a result in this run:", "", *(f"- {text}" for text in found["missing"].values())]
    by_page: dict[str, list[str]] = {}
    for name, told in found["kept"].items():
        by_page.setdefault(told, []).append(f"{found['verdicts'][name]['where']} ({name.replace('_', ' ')})")
    if by_page:
        lines += ["", "Kept from an earlier page, because the folder has no numbers for them:", ""]
        lines += [f"- {told}: {', '.join(names)}" for told, names in by_page.items()]
        lines += [f"- its tables and figures: {'; '.join(found['kept_tables'])}"] if found["kept_tables"] else []
    lines.append("")
    for title, text in found["sections"].items():
        lines += [f"## {title}", "", text, ""]
    for title, name in found["figures"].items():
        lines += [f"## {title}", "", f"![{title}]({FIGURES}/{name})", ""]
    made = found["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    lines += [f"Written by `{' '.join(made['command'])}` with {versions}. Machines of the parts:", ""]
    lines += [*(f"- {table}: {'; '.join(machines)}" for table, machines in found["machines"].items()), ""]
    return "\n".join(lines)


def _told(before: Mapping[str, Any]) -> str:
    """Which page it was."""
    made = before["provenance"]
    revision = (made.get("git_revision") or "")[:7]
    return f"{made['created'][:10]}{f', revision {revision}' if revision else ''}"
