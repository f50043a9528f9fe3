"""What a model made of one item: what two models are compared by."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Outcome:
    """One item of a benchmark, answered."""

    item: str
    """What was asked: the same for every model."""

    relation: str
    """Relation, task or paradigm."""

    subject: str
    """What it is about: items that share it are not independent. Empty where that is the item itself."""

    type: str
    """Group of relations."""

    right: bool | None
    """``None`` where nothing is right or wrong, as in a window of text."""

    log_probability: float | None
    """Of the right answer, nats. Of a window of text: per token; for ``kl``, minus the divergence. Of whole sentences (BLiMP):
    that of the right one minus that of the best wrong one."""

    margin: float | None = None
    """That minus the log-probability of the best wrong answer, where all were scored."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


Outcomes = dict[str, list[Outcome]]
"""Benchmark ↦ its items' outcomes, in a fixed order."""


def outcomes_from(rows: Sequence[dict[str, Any]]) -> list[Outcome]:
    """The inverse of :meth:`Outcome.to_dict`."""
    return [Outcome(**row) for row in rows]
