"""A number with its interval."""

import math
from collections.abc import Mapping, Sequence
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


def ratio_interval(value: float, other: float, n: int, other_n: int) -> Interval:
    """Interval of the ratio of two proportions, on the log scale (Katz et al. 1978).

    It takes them for independent: of two models on the same items it is too wide rather than too narrow. Without bounds where one
    of them is 0.
    """
    if not min(value, other) > 0:
        return None, None
    half = float(stats.norm.ppf(0.5 + CONFIDENCE / 2)) * math.sqrt((1 - value) / (value * n) + (1 - other) / (other * other_n))
    return value / other * math.exp(-half), value / other * math.exp(half)


def exponential(nats: float | None) -> float | None:
    """The perplexity of a loss; ``None`` of one that has none or whose perplexity no number can hold.

    The bound of an interval may lie below 0, where no loss is: its perplexity is 1.
    """
    try:
        return None if nats is None else math.exp(max(0.0, nats))
    except OverflowError:
        return None


def accuracy(benchmark: str, metric: str, right: Sequence[bool], protocol: str) -> Score:
    """The share of right answers, with Wilson's interval."""
    low, high = proportion_interval(sum(right), len(right))
    return Score(benchmark, metric, sum(right) / len(right), low, high, len(right), protocol)


def grouped_accuracy(benchmark: str, right: Sequence[bool], groups: Sequence[Mapping[str, str]], protocol: str) -> list[Score]:
    """Accuracy over all items first, then by group, as ``accuracy/kind=group``.

    Args:
        benchmark: its name.
        right: whether each item was answered rightly; at least one.
        groups: kinds of groups that each item is in, and which; all items have the same kinds.
        protocol: in words.
    """
    scores = [accuracy(benchmark, "accuracy", right, protocol)]
    for kind in groups[0]:
        members: dict[str, list[bool]] = {}
        for hit, group in zip(right, groups, strict=True):
            members.setdefault(group[kind], []).append(hit)
        scores += [accuracy(benchmark, f"accuracy/{kind}={name}", members[name], protocol) for name in sorted(members)]
    return scores


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
    if half == 0:  # rows that are all alike say nothing of their spread
        return None, None
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
