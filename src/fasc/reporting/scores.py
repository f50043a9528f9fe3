"""Scores as a file, with how they were made."""

from collections.abc import Sequence
from pathlib import Path

from fasc.evaluation.options import EvaluationConfig
from fasc.evaluation.score import Score
from fasc.provenance import provenance
from fasc.storage import write_json


def write_scores(path: Path, scores: Sequence[Score], config: EvaluationConfig) -> Path:
    """Write ``scores.json``: an object with ``scores`` and ``provenance``."""
    made = provenance(evaluation=config.model_dump(mode="json", exclude_none=True))
    return write_json(path, {"scores": [score.to_dict() for score in scores], "provenance": made})
