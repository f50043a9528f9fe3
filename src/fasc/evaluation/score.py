"""A number with its interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

CONFIDENCE = 0.95

FEW = 30
"""Of fewer items an interval says nothing of use."""

Interval = tuple[float | None, float | None]
"""Low and high; ``None`` where there is no bound, as of the mean of a single value."""


@dataclass(frozen=True, slots=True)
class Score:
    """One measured value with its 95 % interval."""

    benchmark: str
    metric: str
    value: float
    low: float | None
    """``None`` where what was measured bounds it from nowhere below, such as a single window of text."""

    high: float | None
    """``None`` likewise."""

    n: int
    """Items, or tokens for a score per token."""

    protocol: str = ""
    """How it was measured: corpus, context, stride, candidates."""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def proportion_interval(successes: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a proportion (Wilson 1927)."""
    interval = stats.binomtest(successes, n).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def mean_interval(values: Sequence[float] | ArrayLike) -> Interval:
    """Student's interval of a mean over independent values, such as those of windows of text; of one value it has no bounds."""
    array = np.asarray(values, dtype=np.float64)
    if array.size < 2:
        return None, None
    half = stats.t.ppf(0.5 + CONFIDENCE / 2, array.size - 1) * stats.sem(array)
    return float(array.mean() - half), float(array.mean() + half)


def quantile_interval(values: ArrayLike, level: float) -> Interval:
    """Woodruff's interval of a quantile of all values, whose rows are independent (Woodruff 1952).

    The share of each row's values that lie below the quantile has a mean with an interval over rows; the quantiles at the ends of
    that interval are the ends of this one. Where the share would exceed 1, or fall below 0, there is no bound.

    Args:
        values: [rows, values per row], such as windows of text and their tokens.
        level: of the quantile, such as 0.95.
    """
    array = np.asarray(values, dtype=np.float64)
    below = (array <= np.quantile(array, level)).mean(axis=1)
    low, high = mean_interval(below)
    if low is None or high is None:
        return None, None
    half = (high - low) / 2
    ends = [float(np.quantile(array, share)) if 0 < share < 1 else None for share in (level - half, level + half)]
    return ends[0], ends[1]


def clustered_proportion_interval(values: ArrayLike) -> Interval:
    """Interval of a proportion whose rows are independent: Student's over rows, or Wilson's over all values where that is wider.

    Values of one row are alike, so that Wilson's alone is too narrow; rows that are all alike have no spread.

    Args:
        values: bool [rows, values per row].
    """
    array = np.asarray(values)
    low, high = mean_interval(array.mean(axis=1))
    if low is None or high is None:
        return None, None
    least, most = proportion_interval(int(array.sum()), array.size)
    return max(0.0, min(low, least)), min(1.0, max(high, most))
