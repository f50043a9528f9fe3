"""Two models are compared item by item, and a difference inside its interval is none."""

import numpy as np
import pytest
from scipy import stats

from fasc.errors import UsageError
from fasc.evaluation.outcome import Outcome
from fasc.evaluation.paired import by_group, mcnemar, paired


def outcomes(right, log=None, relations=1, subjects=None):
    log = [-1.0] * len(right) if log is None else log
    return [
        Outcome(f"item {i}", f"r{i % relations}", "" if subjects is None else f"s{subjects[i]}", "t", bool(r), float(value))
        for i, (r, value) in enumerate(zip(right, log, strict=True))
    ]


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (10, 2), (7, 7), (40, 21)])
def test_mcnemar_is_the_probability_of_as_uneven_a_split(lost, gained):
    n = lost + gained
    slow = sum(
        stats.binom.pmf(k, n, 0.5) for k in range(n + 1) if stats.binom.pmf(k, n, 0.5) <= stats.binom.pmf(lost, n, 0.5) * 1.0001
    )
    assert mcnemar(lost, gained) == pytest.approx(slow, abs=1e-9)


def test_flips_are_counted_and_swapping_the_models_swaps_them():
    a, b = outcomes([1, 1, 0, 0, 1] * 20), outcomes([1, 0, 1, 0, 0] * 20)
    there, back = paired("b", ("a", "b"), a, b), paired("b", ("b", "a"), b, a)
    assert (there.lost, there.gained) == (20, 40) == (back.gained, back.lost)
    assert there.p == back.p
    assert there.accuracy_difference == pytest.approx(-back.accuracy_difference) == pytest.approx(0.2)


def test_a_model_beside_itself_shows_no_difference():
    one = outcomes([1, 0] * 30, np.random.default_rng(0).normal(size=60))
    same = paired("b", ("a", "b"), one, one)
    assert (same.lost, same.gained, same.p) == (0, 0, 1.0)
    assert same.log_probability_interval == (0.0, 0.0)
    assert same.verdict == "no difference that these items can tell"


def test_log_probability_tells_what_accuracy_cannot():
    generator = np.random.default_rng(1)
    log = generator.normal(-2, 1, size=300)
    a, b = outcomes([1, 0, 0] * 100, log), outcomes([1, 0, 0] * 100, log - 0.05 + generator.normal(0, 0.1, size=300))
    one = paired("b", ("b", "a"), b, a)
    assert one.lost == one.gained == 0
    assert one.log_probability_interval[1] < 0
    assert one.verdict == "less"


def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        generator = np.random.default_rng(seed)
        base = generator.normal(size=80)
        a, b = outcomes([0] * 80, base), outcomes([0] * 80, base + generator.normal(0.3, 1, size=80))
        low, high = paired("b", ("b", "a"), b, a, seed=seed).log_probability_interval
        covered += low <= 0.3 <= high
    assert covered >= 180


def test_items_of_one_subject_are_not_independent():
    generator = np.random.default_rng(2)
    by_subject = np.repeat(generator.normal(size=20), 10)
    subjects = np.repeat(np.arange(20), 10)
    alone = paired("b", ("b", "a"), outcomes([0] * 200, by_subject), outcomes([0] * 200, np.zeros(200)))
    together = paired(
        "b", ("b", "a"), outcomes([0] * 200, by_subject, subjects=subjects), outcomes([0] * 200, np.zeros(200), subjects=subjects)
    )
    width = [one.log_probability_interval[1] - one.log_probability_interval[0] for one in (alone, together)]
    assert width[1] > 2 * width[0]


def test_different_items_and_too_few_are_refused_or_said():
    with pytest.raises(UsageError, match="different items"):
        paired("b", ("a", "b"), outcomes([1, 0]), outcomes([1, 0, 1]))
    assert paired("b", ("a", "b"), outcomes([1]), outcomes([0])).verdict == "too few items to tell"


def test_groups_hold_every_item_once():
    groups = by_group(outcomes([1] * 9, relations=3), "relation")
    assert sorted(index for group in groups.values() for index in group) == list(range(9))
