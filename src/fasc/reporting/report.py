"""The Markdown report: of a run folder, or of whatever models are given."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fasc.outputs import MARKDOWN_HEAD
from fasc.provenance import recoveries
from fasc.reporting.card import trained_words
from fasc.reporting.entries import Entry, benchmarks_of, read_entries
from fasc.reporting.figures import summary_figure
from fasc.reporting.headline import headline
from fasc.reporting.table import comparison, format_score, markdown_table
from fasc.storage import expanded, new_file, read_json

_EQ6 = """
`fasc-eq6` is the formula that the paper prints (Eq. 6). It has four gradients and two activations where the objective (Eq. 1) has
two and two, ranks directions by sampling noise, and its eigenvectors make no projector; the table shows what that does to a
model. `fasc` solves Eq. 1 itself.
"""


_NOTE = (
    "In brackets: 95 % intervals. That of a ratio of right answers takes the two models as independent; `fasc compare` pairs "
    "their items and tells smaller differences apart. A benchmark with a number behind its name was measured in another way, "
    "on another text or on other items: see below. Rank fraction is rank ÷ smaller dimension of a layer (÷ width of the input "
    "for layers that share a projector); it is not a size: the columns after it are."
)


@dataclass(frozen=True, slots=True)
class Made:
    """Where a part of the report comes from."""

    name: str
    provenance: Mapping[str, Any]
    recipe: str = "recipe.toml"
    """Where it lies."""

    rest: str = "provenance.json"
    """Where the rest lies."""


def report(folder: str | Path) -> Path:
    """Write ``report.md`` and ``figures/summary.png`` into a run's folder, from the files in it.

    Args:
        folder: as ``fasc run`` left it.

    Returns:
        The path of the report.

    Raises:
        StorageError: there are no scores, or a file is damaged.
    """
    folder = expanded(folder)
    entries = read_entries(folder)
    diagnosis_file = folder / "diagnosis.json"
    diagnosis = read_json(diagnosis_file) if diagnosis_file.is_file() else None
    figure = summary_figure(entries, diagnosis, folder / "figures" / "summary.png")
    provenance = read_json(folder / "provenance.json") if (folder / "provenance.json").is_file() else {}
    title = f"What compression kept: {provenance.get('model', folder.name)}"
    figures = [("scores and forecast", figure.relative_to(folder).as_posix())]
    return write_markdown(folder / "report.md", title, entries, figures, [Made("", provenance)])


def write_markdown(
    path: Path, title: str, entries: Sequence[Entry], figures: Sequence[tuple[str, str]], made: Sequence[Made]
) -> Path:
    """Write the report of some models.

    Args:
        path: of the file.
        title: of the page.
        entries: the models, dense ones first.
        figures: what each shows, and its path from the file's folder.
        made: how, a part each.
    """
    header, rows = comparison(entries)
    parts = [
        MARKDOWN_HEAD,
        f"# {_plain(title)}",
        "",
        f"**{_plain(headline(entries))}**",
        "",
        markdown_table(header, rows),
        "",
        _NOTE,
        "",
        *_cautions(entries),
        *(f"![{words}]({place})\n" for words, place in figures),
        _EQ6 if any(entry.name.startswith("fasc-eq6") for entry in entries) else "",
        *_samples(entries),
        *_parts(entries),
        *_protocols(entries),
        *(line for one in made for line in _made(one)),
    ]
    with new_file(path) as scratch:
        scratch.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def _cautions(entries: Sequence[Entry]) -> list[str]:
    return [
        f"The forecast of {_plain(entry.name)} is not to be trusted: {entry.plan['caution']}.\n"
        for entry in entries
        if entry.plan and entry.plan.get("caution") and entry.plan["totals"].get("predicted_loss") is not None
    ]


def _samples(entries: Sequence[Entry]) -> list[str]:
    written = samples_of(entries)
    lines = ["## What each model writes", ""] if written else []
    for prompt, texts in written:
        lines += [f"**{_one_line(prompt)} …**", "", "| model | continues |", "|---|---|"]
        lines += [f"| {name} | {_one_line(text)} |" for name, text in texts]
        lines.append("")
    return lines


def samples_of(entries: Sequence[Entry]) -> list[tuple[str, list[tuple[str, str]]]]:
    """By prompt: what each model wrote after it, word for word."""
    found: dict[str, dict[str, str]] = {}
    for entry in entries:
        for sample in entry.samples:
            found.setdefault(sample["prompt"], {}).setdefault(entry.name, sample["continuation"].strip())
    return [(prompt, list(texts.items())) for prompt, texts in found.items()]


def _one_line(text: str) -> str:
    return _plain(text) or "(nothing)"


def _plain(text: str) -> str:
    """Text in one line that is no Markdown table and no HTML."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _parts(entries: Sequence[Entry]) -> list[str]:
    """Types and relations of facts."""
    lines: list[str] = []
    for benchmark in benchmarks_of(entries):
        for facet in ("type", "relation"):
            details = [entry.details(benchmark, f"accuracy/{facet}=") for entry in entries]
            kinds = list(dict.fromkeys(kind for one in details for kind in one))
            if not kinds:
                continue
            header = [f"{benchmark}, by {facet}", "n", *(entry.name for entry in entries)]
            rows = []
            for kind in kinds:
                n = next((str(one[kind]["n"]) for one in details if kind in one), "–")
                rows.append([kind, n, *(format_score(one.get(kind)) for one in details)])
            lines += [f"## {_plain(benchmark)} by {facet}", "", markdown_table(header, rows), ""]
    return lines


def _protocols(entries: Sequence[Entry]) -> list[str]:
    found = [f"- **{_plain(name)}**: {_plain(text)}" for name, text in protocols_of(entries)]
    return ["## How it was measured", "", *found, ""] if found else []


def protocols_of(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """How each benchmark was asked, by its name."""
    found: dict[str, str] = {}
    for entry in entries:
        for score in entry.scores:
            found.setdefault(score["benchmark"], f"{score['protocol']}; n = {score['n']:,}".lstrip("; "))
    return sorted(found.items())


def _made(one: Made) -> list[str]:
    if not one.provenance:
        return []
    command = command_of(one.provenance)
    return [
        f"## How {_plain(one.name) or 'it'} was made",
        "",
        *([f"- command: `{command}`"] if command else []),
        *(f"- {name}: {words}" for name, words in facts_of(one.provenance)),
        f"- recipe: `{one.recipe}`; what else is known is in `{one.rest}`",
        "",
    ]


def command_of(made: Mapping[str, Any]) -> str:
    """What to type to do it again."""
    command = made.get("command")
    return shlex.join(map(str, command)).replace("__main__.py", "fasc", 1) if isinstance(command, list) else ""


def facts_of(made: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Model, time, versions, machine and digests of a provenance, as far as it holds them."""
    names = {"model": "model", "created": "made", "git_revision": "revision"}
    facts = [(words, str(made[key])) for key, words in names.items() if made.get(key)]
    for key in ("versions", "machine"):
        if isinstance(made.get(key), Mapping):
            facts.append((key, ", ".join(f"{name} {value}" for name, value in made[key].items())))
    compressed = made.get("compressed")
    if isinstance(compressed, Mapping) and (first := command_of(compressed)):
        facts.insert(0, ("compressed by", first))
    for one in recoveries(made) if isinstance(made.get("recovery"), Mapping) else ():
        facts.append(("then trained", trained_words(one)))
    statistics = made.get("statistics")
    if isinstance(statistics, Mapping):
        text = statistics.get("calibration")
        if isinstance(text, Mapping) and {"corpus", "sequences", "sequence_length"} <= text.keys():
            words = (
                f"{text['sequences']} × {text['sequence_length']} tokens of `{text['corpus']}`, {text.get('labels', '')} labels"
            )
            facts.append(("calibration", words))
        facts += [
            (key.replace("_", " "), str(statistics[key])) for key in sorted(statistics) if "digest" in key or key == "tokens"
        ]
    return facts
