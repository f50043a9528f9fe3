"""Several models, item by item."""

from dataclasses import dataclass, field
from typing import Any

from fasc.evaluation.paired import Paired
from fasc.evaluation.score import Score


@dataclass(frozen=True, slots=True)
class Compared:
    """Several models, item by item."""

    names: tuple[str, ...]
    """The reference first."""

    scores: dict[str, list[Score]]
    pairs: list[Paired]
    """Each model against the reference, then the others against each other, by benchmark."""

    groups: list[dict[str, Any]] = field(default_factory=list)
    """Each model against the reference, by type of relation and by how common the subject is."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "models": list(self.names),
            "scores": {name: [one.to_dict() for one in scores] for name, scores in self.scores.items()},
            "pairs": [one.to_dict() for one in self.pairs],
            "groups": self.groups,
        }
