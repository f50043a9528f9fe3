"""Intervals cover what they say, stay in their range, and are not made up."""

import json

import numpy as np
import pytest

from fasc.evaluation.score import (
    Score,
    clustered_proportion_interval,
    mean_interval,
    proportion_interval,
    quantile_interval,
)


@pytest.fixture
def random():
    return np.random.default_rng(0)


def covered(draw, interval, truth, times=400):
    """The share of times in which the interval holds the truth."""
    hits = 0
    for _ in range(times):
        low, high = interval(draw())
        hits += (low is None or low <= truth) and (high is None or truth <= high)
    return hits / times


def test_the_interval_of_a_proportion_is_wilsons():
    low, high = proportion_interval(30, 100)
    assert (round(low, 3), round(high, 3)) == (0.219, 0.396)  # Wilson 1927, as in any table
    assert proportion_interval(0, 10)[0] == 0
    assert proportion_interval(10, 10)[1] == pytest.approx(1)
    assert 0 < proportion_interval(1, 1)[0] < 0.3, "one item says little, and the interval says so"


def test_the_interval_of_a_mean_covers_it(random):
    assert 0.92 < covered(lambda: random.normal(size=20), mean_interval, 0) < 0.98


def test_the_interval_of_a_quantile_covers_it_where_values_of_a_row_are_alike(random):
    """Rows share a level: all the values as independent ones would give an interval far too narrow."""

    def draw():
        return random.normal(size=(20, 1)) + random.normal(size=(20, 50))

    truth = 1.6448536 * 2**0.5
    assert 0.9 < covered(draw, lambda values: quantile_interval(values, 0.95), truth) < 0.99
    assert covered(lambda: draw().reshape(-1, 1), lambda values: quantile_interval(values, 0.95), truth) < 0.9


def test_the_interval_of_a_proportion_of_clusters_covers_it(random):
    def draw():
        return random.random((20, 50)) < random.beta(2, 1, size=(20, 1))

    assert 0.92 < covered(draw, clustered_proportion_interval, 2 / 3) < 0.98
    low, high = clustered_proportion_interval(np.ones((20, 50), dtype=bool))
    assert (low, high) == (pytest.approx(1 - 0.0038, abs=1e-4), 1), "rows that are all alike do not make it certain"
    low, high = clustered_proportion_interval(np.arange(20)[:, None] < [10])
    assert 0 <= low < 0.5 < high <= 1


def test_a_single_row_has_no_bounds_and_the_score_is_still_json():
    values = np.linspace(0, 1, 50)[None]
    for interval in (mean_interval([3.0]), quantile_interval(values, 0.95), clustered_proportion_interval(values > 0.5)):
        assert interval == (None, None)
    score = Score("kl", "kl", 3.0, *mean_interval([3.0]), n=50)
    assert json.loads(json.dumps(score.to_dict(), allow_nan=False))["low"] is None


def test_a_quantile_beyond_what_was_seen_has_no_bound_above(random):
    low, high = quantile_interval(random.exponential(size=(3, 40)), 0.99)
    assert low is not None
    assert high is None
