"""Scores as a file, with how they were made."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fasc.errors import StorageError, UsageError
from fasc.evaluation.evaluate import Record
from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcomes
from fasc.evaluation.score import Score
from fasc.outputs import write_artifact
from fasc.progress import say
from fasc.provenance import provenance
from fasc.storage import read_json

ITEMS = "items.json"
"""In a run, beside a model's scores: what it made of each item."""


def write_outcomes(path: Path, outcomes: Outcomes) -> Path:
    """Write what a model made of each item, by benchmark."""
    return write_artifact(path, "items", {"items": {name: [one.to_dict() for one in some] for name, some in outcomes.items()}})


def write_scores(path: Path, scores: Sequence[Score], config: EvaluationConfig, record: Record | None = None) -> Path:
    """Write ``scores.json``: an object with ``scores`` and ``provenance``; with a record also ``model`` and ``contamination``.

    What such a file already holds of the same weights and of other benchmarks stays in it, and so does the provenance of that.
    """
    made = provenance(evaluation=config.model_dump(mode="json", exclude_none=True))
    value: dict[str, Any] = {"scores": [score.to_dict() for score in scores], "provenance": made}
    if record is not None:
        value |= {key: found for key in ("model", "contamination") if (found := getattr(record, key))}
        value = _joined(value, path)
    return write_artifact(path, "scores", value)


def _joined(value: dict[str, Any], path: Path) -> dict[str, Any]:
    with suppress(StorageError, KeyError, TypeError, AttributeError):  # what is damaged is replaced
        earlier = read_json(path) if path.is_file() else {}
        weights = value["model"]["fingerprint"]
        if earlier["model"]["fingerprint"] == weights:
            now = {score["benchmark"] for score in value["scores"]}
            ways = {(score["benchmark"], score["protocol"], score["n"]) for score in value["scores"]}
            gone = [
                s["benchmark"]
                for s in earlier["scores"]
                if s["benchmark"] in now and "=" not in s["metric"] and (s["benchmark"], s["protocol"], s["n"]) not in ways
            ]
            if gone:
                say(f"`{path}` held {', '.join(dict.fromkeys(gone))} of another text, protocol or number of items: replaced")
            kept = [score for score in earlier["scores"] if score["benchmark"] not in now]
            names = list(dict.fromkeys(score["benchmark"] for score in kept))
            looked = {key: count for key, count in earlier.get("contamination", {}).items() if key in names}
            looked |= value.get("contamination", {})
            told = [earlier["provenance"], *earlier.get("earlier", [])]
            if names:
                say(f"`{path}` keeps what it held of the same weights: {', '.join(names)}")
                found = {"contamination": looked} if looked else {}
                return value | {"scores": [*value["scores"], *kept], "earlier": told} | found
    return value


def require_other_scores_nowhere(path: Path, model: str) -> None:
    """See that a file of scores that is to be written holds none of another model, by its name.

    Raises:
        StorageError: it does.
    """
    held = None
    with suppress(StorageError, KeyError, TypeError, AttributeError):
        held = read_json(path.expanduser())["model"]["name"] if path.expanduser().is_file() else None
    if held is not None and str(held) != model:
        raise StorageError(f"`{path}` holds the scores of {held}, which would be lost", "choose another --json")


def require_scores_of(found: Mapping[str, Any], where: str, checkpoint: str, *, model: str, fingerprint: str | None) -> None:
    """See that scores are those of the dense model that a checkpoint was made from.

    Args:
        found: content of a file of scores.
        where: the file.
        checkpoint: in words.
        model: the dense model, as the checkpoint names it.
        fingerprint: of its weights, as the checkpoint knows it; ``None`` if it does not.

    Raises:
        UsageError: they are of another model.
    """
    of = found.get("model")
    if not isinstance(of, dict):
        say(f"warning: {where} does not say of which model its scores are; they are shown as those of {model}")
        return
    again = f"`fasc evaluate {model} --json FILE` writes the dense model's"
    if of.get("made_from"):
        raise UsageError(f"{where} holds scores of {of['name']}, which was compressed from {of['made_from']}", again)
    if of.get("fingerprint") != fingerprint and of.get("name") != model:
        raise UsageError(f"{where} holds scores of {of['name']}, and {checkpoint} was made from {model}", again)


def require_scores_of_itself(found: Mapping[str, Any], where: str, checkpoint: str) -> None:
    """See that scores beside a checkpoint are not those of a dense model.

    Raises:
        UsageError: they are.
    """
    of = found.get("model")
    if isinstance(of, dict) and not of.get("made_from"):
        raise UsageError(
            f"{where} holds scores of {of.get('name')}, a dense model, where those of `{checkpoint}` are looked for",
            f"`fasc evaluate {checkpoint} --json FILE` writes them; name the dense model's by --dense",
        )
    if isinstance(of, dict) and Path(str(of.get("name"))).name != Path(checkpoint).name:
        say(f"warning: {where} says that its scores are of {of.get('name')}")
