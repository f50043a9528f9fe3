"""A number with its interval."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Score:
    """One measured value with its 95 % interval."""

    benchmark: str
    metric: str
    value: float
    low: float
    high: float
    n: int
    """Items, or tokens for a score per token."""

    protocol: str = ""
    """How it was measured: corpus, context, stride, candidates."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def proportion_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927)."""
    z = float(stats.norm.ppf(0.5 + CONFIDENCE / 2))
    share = successes / n
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Student's interval of a mean over independent sequences; infinite for a single one is avoided by returning it twice."""
    array = np.asarray(values)
    mean = float(array.mean())
    if array.size < 2:
        return mean, mean
    half = float(stats.t.ppf(0.5 + CONFIDENCE / 2, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size))
    return mean - half, mean + half
