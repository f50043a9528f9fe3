"""The Markdown report of a run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    header, rows = comparison(entries)
    provenance = read_json(folder / "provenance.json") if (folder / "provenance.json").is_file() else {}
    parts = [
        f"# What compression kept: {provenance.get('model', folder.name)}",
        "",
        f"**{headline(entries)}**",
        "",
        markdown_table(header, rows),
        "",
        "In brackets: 95 % intervals. Rank fraction is rank ÷ smaller dimension of a layer (÷ width of the input for layers that "
        "share a projector); it is not a size: the columns after it are.",
        "",
        f"![scores and forecast]({figure.relative_to(folder).as_posix()})",
        _EQ6 if any(entry.name.startswith("fasc-eq6") for entry in entries) else "",
        *_samples(entries),
        *_relations(entries),
        *_protocols(entries),
        *_made(provenance, folder),
    ]
    path = folder / "report.md"
    with new_file(path) as scratch:
        scratch.write_text("\n".join(parts) + "\n", encoding="utf-8")
    return path


def _samples(entries: Sequence[Entry]) -> list[str]:
    """What each model wrote after the same prompts, word for word."""
    writing = [entry for entry in entries if entry.samples]
    if not writing:
        return []
    lines = ["## What each model writes", ""]
    for index, sample in enumerate(writing[0].samples):
        lines += [f"**{sample['prompt']} …**", "", "| model | continues |", "|---|---|"]
        lines += [f"| {entry.name} | {_one_line(entry.samples[index]['continuation'])} |" for entry in writing]
        lines.append("")
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|") or "(nothing)"


def _relations(entries: Sequence[Entry]) -> list[str]:
    lines: list[str] = []
    for benchmark in benchmarks_of(entries):
        kinds = list(dict.fromkeys(kind for entry in entries for kind in entry.details(benchmark, "accuracy/relation=")))
        if not kinds:
            continue
        header = [f"{benchmark}, by relation", "n", *(entry.name for entry in entries)]
        rows = []
        for kind in kinds:
            scores = [entry.details(benchmark, "accuracy/relation=").get(kind) for entry in entries]
            n = next((str(score["n"]) for score in scores if score), "–")
            rows.append([kind, n, *(format_score(score) for score in scores)])
        lines += [f"## {benchmark}", "", markdown_table(header, rows), ""]
    return lines


def _protocols(entries: Sequence[Entry]) -> list[str]:
    words = {s["benchmark"]: f"{s['protocol']}; n = {s['n']:,}" for e in entries for s in reversed(e.scores)}
    return ["## How it was measured", "", *(f"- **{name}**: {text}" for name, text in sorted(words.items())), ""]


def _made(provenance: Mapping[str, Any], folder: Path) -> list[str]:
    if not provenance:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    machine = provenance["machine"]
    return [
        "## How it was made",
        "",
        f"- command: `{' '.join(provenance['command'])}`",
        f"- versions: {versions}",
        f"- machine: {machine['processor']}, {machine['cores']} cores",
        f"- recipe: `{(folder / 'recipe.toml').name}` in this folder; digests of the model and of the calibration tokens are in "
        "`provenance.json`",
    ]
