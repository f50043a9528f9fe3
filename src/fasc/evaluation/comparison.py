"""One quantity of two models, measured in turn."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class Comparison:
    """One quantity of both models."""

    what: str
    unit: str
    dense: float
    """Median over the rounds."""

    compressed: float
    ratio: float
    """Median over the rounds of compressed ÷ dense, of the speed (or of the size)."""

    low: float
    """Smallest ratio of a round."""

    high: float
    """Largest."""

    @classmethod
    def of(cls, what: str, unit: str, rounds: Sequence[tuple[float, float]]) -> Self:
        """Of (dense, compressed) of each round."""
        ratios = [compressed / dense for dense, compressed in rounds]
        dense, compressed = (median(values) for values in zip(*rounds, strict=True))
        return cls(what, unit, dense, compressed, median(ratios), min(ratios), max(ratios))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)
