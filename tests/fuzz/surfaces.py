"""Everything that a user can hand in: how it is made, how it is damaged, and the command that reads it."""

import csv
import gzip
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz import mutations
from tests.fuzz.mutations import TEXTS

Run = Callable[..., tuple[int, str, str]]
"""Arguments of the command ↦ exit code, stdout, stderr."""

SIZES = ("--sequences", "6", "--sequence-length", "8")
_SENTENCES = [
    f"Sentence {i} says that {word} is {i % 7} times as long as the other." for i, word in enumerate(["fox", "dog", "cat"] * 20)
]


@dataclass(frozen=True)
class Base:
    """What is whole: made once, copied for each case."""

    model: Path
    text: Path
    statistics: Path
    plan: Path
    checkpoint: Path
    recipe: Path


Surface = Callable[[Base, Path, random.Random], list[str]]
"""Copies what it needs into an empty folder, damages it, and gives the command."""


def make_base(folder: Path, model: Path, run: Run) -> Base:
    """A model, its moments, a plan, a checkpoint and a recipe."""
    base = Base(
        model,
        folder / "text.txt",
        folder / "statistics.safetensors",
        folder / "plan.json",
        folder / "small",
        folder / "recipe.toml",
    )
    base.text.write_text("\n".join(_SENTENCES), encoding="utf-8")
    budget = ("--param-fraction", "0.7", "--overhead", "0", "--damping", "1e-2", "--rank-multiple", "1")
    for command in (
        ("collect", model, "--corpus", base.text, "--sequences", "20", "--sequence-length", "16", "--out", base.statistics),
        ("plan", model, "--statistics", base.statistics, *budget, "--json", base.plan),
        ("compress", model, "--statistics", base.statistics, *budget, "--out", base.checkpoint),
    ):
        code, _, err = run(*command)
        assert code == 0, err
    base.recipe.write_text(
        f"""budgets = [{{ param_fraction = 0.7, overhead = 0, rank_multiple = 1 }}]

[source]
model = "{model}"

[calibration]
corpus = "{base.text}"
sequences = 12
sequence_length = 16

[[methods]]
name = "fasc"
damping = 0.01
label = "own"

[evaluation]
benchmarks = ["perplexity"]
corpus = "{base.text}"
windows = 2
context = 16
""",
        encoding="utf-8",
    )
    return base


def _rows() -> list[dict[str, object]]:
    return [{"text": sentence, "number": place} for place, sentence in enumerate(_SENTENCES)]


def _chats() -> list[dict[str, object]]:
    return [{"messages": [{"role": "user", "content": one}, {"role": "assistant", "content": one}]} for one in _SENTENCES[:20]]


def _csv() -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ("text", "number"))
    writer.writeheader()
    writer.writerows(_rows())
    return out.getvalue().encode()


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(_rows()), out)
    return out.getvalue()


_CORPORA: dict[str, Callable[[], bytes]] = {
    "a.txt": lambda: "\n".join(_SENTENCES).encode(),
    "a.json": lambda: json.dumps(_rows()).encode(),
    "a.jsonl": lambda: "\n".join(map(json.dumps, _rows())).encode(),
    "chats.jsonl": lambda: "\n".join(map(json.dumps, _chats())).encode(),
    "a.csv": _csv,
    "a.tsv": lambda: _csv().replace(b",", b"\t"),
    "a.parquet": _parquet,
    "a.txt.gz": lambda: gzip.compress("\n".join(_SENTENCES).encode(), mtime=0),
    "a.jsonl.gz": lambda: gzip.compress("\n".join(map(json.dumps, _rows())).encode(), mtime=0),
}


def corpus(base: Base, place: Path, dice: random.Random) -> list[str]:
    """A damaged text of each format."""
    name = dice.choice(sorted(_CORPORA))
    file = place / name
    data = _CORPORA[name]()
    if name.endswith(".jsonl") and dice.random() < 0.5:
        lines = data.decode().splitlines()
        line = dice.randrange(len(lines))
        lines[line] = mutations.json_of(json.loads(lines[line]), dice)
        file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    elif name.endswith(".json") and dice.random() < 0.5:
        file.write_text(mutations.json_of(json.loads(data), dice), encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(data)
        mutations.text_file(file, dice)
    return ["collect", str(base.model), "--corpus", str(file), *SIZES, "--out", "out.safetensors"]


def model(base: Base, place: Path, dice: random.Random) -> list[str]:
    """A damaged dense model."""
    folder = Path(shutil.copytree(base.model, place / "model"))
    _damage(folder, dice)
    return dice.choice(
        (
            ["plan", str(folder), "--param-fraction", "0.8", "--overhead", "0"],
            ["collect", str(folder), "--corpus", str(base.text), *SIZES, "--out", "out.safetensors"],
        )
    )


def checkpoint(base: Base, place: Path, dice: random.Random) -> list[str]:
    """A damaged checkpoint of ours."""
    folder = Path(shutil.copytree(base.checkpoint, place / "small"))
    _damage(folder, dice)
    return [
        "evaluate",
        str(folder),
        "--benchmarks",
        "perplexity",
        "--corpus",
        str(base.text),
        "--windows",
        "2",
        "--context",
        "16",
    ]


def _damage(folder: Path, dice: random.Random) -> None:
    files = [file for file in sorted(folder.iterdir()) if file.suffix in (".json", ".safetensors")]
    chosen = dice.choice([*files, *(file for file in files if file.name in ("config.json", "model.safetensors"))])
    if dice.random() < 0.05:
        chosen.unlink()
    elif chosen.suffix == ".json":
        mutations.json_file(chosen, dice)
    else:
        mutations.safetensors_file(chosen, dice)


def statistics(base: Base, place: Path, dice: random.Random) -> list[str]:
    """A damaged file of moments."""
    file = Path(shutil.copy(base.statistics, place / "statistics.safetensors"))
    mutations.safetensors_file(file, dice)
    budget = ("--param-fraction", "0.7", "--overhead", "0", "--damping", "1e-2")
    return ["plan", str(base.model), "--statistics", str(file), *budget]


def plan(base: Base, place: Path, dice: random.Random) -> list[str]:
    """A damaged plan."""
    file = Path(shutil.copy(base.plan, place / "plan.json"))
    mutations.json_file(file, dice)
    return ["compress", str(base.model), "--statistics", str(base.statistics), "--plan", str(file), "--out", "out"]


def recipe(base: Base, place: Path, dice: random.Random) -> list[str]:
    """A damaged recipe."""
    file = Path(shutil.copy(base.recipe, place / "recipe.toml"))
    mutations.toml_file(file, dice)
    return ["run", str(file), "--out", "run"]


_VALUES = {
    "plan": (
        "--param-fraction",
        "--rank-fraction",
        "--max-bytes",
        "--max-kl",
        "--layouts",
        "--method",
        "--rank-multiple",
        "--damping",
        "--floor",
        "--include",
        "--exclude",
        "--dtype",
        "--for",
        "--bits",
        "--statistics",
        "--json",
        "--method-option",
    ),
    "collect": (
        "--corpus",
        "--sequences",
        "--sequence-length",
        "--seed",
        "--labels",
        "--methods",
        "--batch-tokens",
        "--device",
        "--dtype",
        "--include",
        "--out",
        "--data-dir",
    ),
    "evaluate": ("--benchmarks", "--corpus", "--windows", "--context", "--limit", "--dense", "--device", "--json"),
    "compress": ("--param-fraction", "--plan", "--statistics", "--corpus", "--sequences", "--method", "--format", "--out"),
    "export": ("--format", "--type", "--max-bytes", "--out"),
    "bench": ("--prefill", "--batches", "--repeats", "--decode", "--dense"),
}


def options(base: Base, place: Path, dice: random.Random) -> list[str]:
    """One option of a verb with a value that it does not expect."""
    verb = dice.choice(sorted(_VALUES))
    usual = {
        "plan": [str(base.model), "--param-fraction", "0.8"],
        "collect": [str(base.model), "--corpus", str(base.text), *SIZES, "--out", "out.safetensors"],
        "evaluate": [
            str(base.checkpoint),
            "--benchmarks",
            "perplexity",
            "--corpus",
            str(base.text),
            "--windows",
            "1",
            "--context",
            "16",
        ],
        "compress": [str(base.model), "--rank-fraction", "0.5", "--statistics", str(base.statistics), "--out", "out"],
        "export": [str(base.model), "--out", "out.gguf"],
        "bench": [str(base.checkpoint), "--prefill", "8", "--prompt", "4", "--decode", "2", "--repeats", "1", "--batches", "1"],
    }[verb]
    flag, value = dice.choice(_VALUES[verb]), dice.choice(TEXTS)
    arguments = list(usual)
    if flag in arguments:
        del arguments[arguments.index(flag) : arguments.index(flag) + 2]
    del place
    return [verb, *arguments, flag, value]


SURFACES: dict[str, Surface] = {
    "corpus": corpus,
    "model": model,
    "checkpoint": checkpoint,
    "statistics": statistics,
    "plan": plan,
    "recipe": recipe,
    "options": options,
}
