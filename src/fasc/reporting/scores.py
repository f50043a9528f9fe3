"""Scores as a file, with how they were made."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.outcome import Outcomes
from fasc.evaluation.score import Score
from fasc.outputs import write_artifact
from fasc.provenance import provenance

ITEMS = "items.json"
"""In a run, beside a model's scores: what it made of each item."""


def write_outcomes(path: Path, outcomes: Outcomes) -> Path:
    """Write what a model made of each item, by benchmark."""
    return write_artifact(path, "items", {"items": {name: [one.to_dict() for one in some] for name, some in outcomes.items()}})


def write_scores(
    path: Path, scores: Sequence[Score], config: EvaluationConfig, contamination: Mapping[str, Mapping[str, int]] | None = None
) -> Path:
    """Write ``scores.json``: an object with ``scores``, ``contamination`` where it was looked for, and ``provenance``."""
    made = provenance(evaluation=config.model_dump(mode="json", exclude_none=True))
    value = {"scores": [score.to_dict() for score in scores], "provenance": made}
    return write_artifact(path, "scores", value | ({"contamination": contamination} if contamination else {}))
