"""What a run left in its folder, one entry per model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from fasc.errors import StorageError, UsageError
from fasc.options import Options, parse
from fasc.storage import read_json

DENSE = "dense"
"""Folder name of the uncompressed model's scores."""

RIVAL = "rival.json"
"""Beside the scores of a dense model of another size: which it is, and what it weighs."""


class Rival(Options):
    """A dense model of another size."""

    model: str
    parameters: PositiveInt
    bytes: PositiveInt


@dataclass(frozen=True, slots=True)
class Entry:
    """One model of a run: its scores, and its plan if it is compressed."""

    name: str
    scores: Sequence[Mapping[str, Any]]
    plan: Mapping[str, Any] | None
    samples: Sequence[Mapping[str, str]] = ()
    """What it wrote after each prompt."""

    speeds: Sequence[Mapping[str, Any]] = ()
    """Its speed beside the dense model's."""

    rival: Rival | None = None
    """What another dense model is; ``None`` for the dense model that the others were made from, and for these."""

    def score(self, benchmark: str) -> Mapping[str, Any] | None:
        """The headline score of a benchmark: the first one, over all items."""
        return next((score for score in self.scores if score["benchmark"] == benchmark), None)

    def speed(self, what: str) -> tuple[float, float, float] | None:
        """Median, least and largest ratio to the dense model of the first speed whose name begins so."""
        row = next((row for row in self.speeds if row["what"].startswith(what)), None)
        return None if row is None else (row["ratio"], row["low"], row["high"])

    def details(self, benchmark: str, prefix: str) -> dict[str, Mapping[str, Any]]:
        """Scores of parts of a benchmark whose metric starts with ``prefix``, by the rest of the name."""
        return {
            score["metric"].removeprefix(prefix): score
            for score in self.scores
            if score["benchmark"] == benchmark and score["metric"].startswith(prefix)
        }


def read_entries(folder: Path) -> list[Entry]:
    """The models of a run folder, the dense one first.

    Raises:
        StorageError: there is no scored model in it.
    """
    files = sorted(folder.glob("*/scores.json"), key=lambda file: (file.parent.name != DENSE, file.stat().st_mtime))
    entries = []
    for file in files:
        scores = read_json(file)
        if not isinstance(scores, dict) or not isinstance(scores.get("scores"), list):
            raise StorageError(f"`{file}` holds no scores of fasc", "name a folder that `fasc run` left")
        place = file.parent
        plan = read_json(place / "plan.json") if (place / "plan.json").is_file() else None
        samples, speeds = _rows(place / "samples.json", "samples"), _rows(place / "speed.json", "comparisons")
        entries.append(Entry(place.name, scores["scores"], plan, samples, speeds, _rival(place / RIVAL)))
    if not entries:
        raise StorageError(f"`{folder}` holds no scores", "run `fasc run recipe.toml --out FOLDER` first")
    return entries


def _rival(file: Path) -> Rival | None:
    if not file.is_file():
        return None
    try:
        return parse(Rival, read_json(file), f"`{file}`")
    except (UsageError, TypeError, ValueError) as problem:
        raise StorageError(f"`{file}` does not say what the model weighs", "run `fasc run` again without it") from problem


def _rows(file: Path, key: str) -> Sequence[Any]:
    """Of a file that may be absent."""
    content = read_json(file) if file.is_file() else {key: ()}
    if not isinstance(content, dict) or not isinstance(content.get(key), (list, tuple)):
        raise StorageError(f"`{file}` holds no `{key}` of fasc", "name a folder that `fasc run` left")
    found: Sequence[Any] = content[key]
    return found


def benchmarks_of(entries: Sequence[Entry]) -> list[str]:
    """Names of the benchmarks, in the order in which they were run."""
    return list(dict.fromkeys(score["benchmark"] for entry in entries for score in entry.scores))
