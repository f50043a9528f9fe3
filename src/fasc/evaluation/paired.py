"""Two models, item by item: what one lost and gained against the other, and whether so many items can tell.

A model that answers 2 % fewer items may have lost 10 % and gained 8 %. And long before an answer flips, its probability moves:
the mean difference of the right answer's log-probability tells far smaller changes apart than accuracy does.

Items are not independent: those of one relation share a wording, those of one subject a person. Intervals come from a bootstrap
that draws relations and subjects anew, and weights each item by how often both were drawn (the pigeonhole bootstrap, Owen 2007,
arXiv:0712.0269, "The pigeonhole bootstrap").
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from fasc.errors import UsageError
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.score import CONFIDENCE, Interval

_DRAWS = 2_000
FEW_TO_TELL = 10
"""Of fewer items no verdict is given: nobody can see whether their differences are anything like normal."""

_MANY = 10
"""Of fewer relations none are drawn: they are then all that is asked about."""


@dataclass(frozen=True, slots=True)
class Paired:
    """What a model made of a benchmark, beside another."""

    benchmark: str
    model: str
    reference: str
    n: int
    accuracy: float | None
    """Of the model; ``None`` where nothing is right or wrong."""

    reference_accuracy: float | None
    lost: int
    """Items that the reference answers rightly and the model does not."""

    gained: int
    p: float | None
    """McNemar's exact test: the probability of as uneven a split of the flips, if either model were as likely to win one."""

    accuracy_difference: float | None
    accuracy_interval: Interval
    log_probability_difference: float | None
    """Mean difference of the right answer's log-probability, nats; model minus reference."""

    log_probability_interval: Interval

    @property
    def verdict(self) -> str:
        """What the numbers allow to be said. A difference inside its interval is no gain and no loss."""
        if self.n < FEW_TO_TELL:
            return "too few items to tell"
        for low, high in (self.log_probability_interval, self.accuracy_interval):
            if low is not None and high is not None:
                return "less" if high < 0 else "more" if low > 0 else "no difference that these items can tell"
        return "too few items to tell"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"verdict": self.verdict}


def paired(
    benchmark: str, names: tuple[str, str], model: Sequence[Outcome], reference: Sequence[Outcome], *, seed: int = 0
) -> Paired:
    """Compare what two models made of the same items.

    Args:
        benchmark: its name.
        names: of the model and of the reference.
        model: outcomes.
        reference: outcomes of the same items in the same order.
        seed: of the bootstrap.

    Raises:
        UsageError: the items differ.
    """
    if [one.item for one in model] != [one.item for one in reference]:
        raise UsageError(
            f"`{names[0]}` and `{names[1]}` were asked different items of `{benchmark}`", "score both with the same options"
        )
    weights = _weights(reference, seed)
    right = _column([one.right for one in model])
    reference_right = _column([one.right for one in reference])
    lost = gained = 0
    if right is not None and reference_right is not None:
        lost, gained = int((right < reference_right).sum()), int((right > reference_right).sum())
    log = _column([one.log_probability for one in model])
    reference_log = _column([one.log_probability for one in reference])
    clusters = _clusters(reference)
    accuracy = _difference(right, reference_right, weights, clusters)
    log_probability = _difference(log, reference_log, weights, clusters)
    return Paired(
        benchmark=benchmark,
        model=names[0],
        reference=names[1],
        n=len(model),
        accuracy=None if right is None else float(right.mean()),
        reference_accuracy=None if reference_right is None else float(reference_right.mean()),
        lost=lost,
        gained=gained,
        p=None if right is None else mcnemar(lost, gained),
        accuracy_difference=accuracy[0],
        accuracy_interval=accuracy[1],
        log_probability_difference=log_probability[0],
        log_probability_interval=log_probability[1],
    )


def mcnemar(lost: int, gained: int) -> float:
    """McNemar's exact test, two-sided: each of ``lost + gained`` flips falls to either side with probability ½ (McNemar 1947)."""
    return 1.0 if lost + gained == 0 else float(stats.binomtest(min(lost, gained), lost + gained, 0.5).pvalue)


def _column(values: Sequence[float | bool | None]) -> NDArray[np.float64] | None:
    return None if any(value is None for value in values) else np.asarray(values, dtype=np.float64)


def _difference(
    values: NDArray[np.float64] | None,
    reference: NDArray[np.float64] | None,
    weights: NDArray[np.float64] | None,
    clusters: int,
) -> tuple[float | None, Interval]:
    """Mean difference, and the bootstrap's interval of it."""
    if values is None or reference is None:
        return None, (None, None)
    difference = values - reference
    if weights is None:
        return float(difference.mean()), (None, None)
    mean = float(difference.mean())
    means = weights @ difference / weights.sum(axis=1)
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    wider = _few(clusters)
    return mean, (mean - wider * (mean - float(low)), mean + wider * (float(high) - mean))


def _few(clusters: int) -> float:
    """How much wider an interval from a bootstrap's quantiles must be.

    These are quantiles of the normal distribution with the spread of n draws; so few clusters have Student's, with that of n − 1.
    """
    normal = stats.norm.ppf(0.5 + CONFIDENCE / 2)
    return float(stats.t.ppf(0.5 + CONFIDENCE / 2, clusters - 1) / normal * (clusters / (clusters - 1)) ** 0.5)


def _weights(outcomes: Sequence[Outcome], seed: int) -> NDArray[np.float64] | None:
    """How often each item was drawn, [draws, items]; ``None`` of fewer than two items or subjects."""
    generator = np.random.default_rng(seed)
    subjects = _codes([one.subject or one.item for one in outcomes])
    relations = _codes([one.relation for one in outcomes])
    if subjects.size == 0 or subjects.max() < 1:
        return None
    weights = _draw(generator, subjects)
    if relations.max() + 1 >= _MANY:
        weights *= _draw(generator, relations)
    drawn: NDArray[np.float64] = weights[weights.sum(axis=1) > 0]
    return drawn


def _clusters(outcomes: Sequence[Outcome]) -> int:
    """The fewest that anything is drawn of."""
    subjects, relations = len({one.subject or one.item for one in outcomes}), len({one.relation for one in outcomes})
    return min(subjects, relations) if relations >= _MANY else subjects


def _codes(labels: Sequence[str]) -> NDArray[np.int64]:
    known: dict[str, int] = {}
    return np.asarray([known.setdefault(label, len(known)) for label in labels], dtype=np.int64)


def _draw(generator: np.random.Generator, codes: NDArray[np.int64]) -> NDArray[np.float64]:
    clusters = int(codes.max()) + 1
    counts = generator.multinomial(clusters, np.full(clusters, 1 / clusters), size=_DRAWS)
    return counts[:, codes].astype(np.float64)


def by_group(outcomes: Sequence[Outcome], kind: str) -> dict[str, list[int]]:
    """Indices of the items of each ``type`` or ``relation``, in the order of their names."""
    groups: dict[str, list[int]] = {}
    for index, one in enumerate(outcomes):
        groups.setdefault(getattr(one, kind), []).append(index)
    return dict(sorted(groups.items()))
