"""ρ: zero coupling gives its noise floor, perfect coupling gives one, and the side of the moments does not matter."""

from dataclasses import replace

import pytest
import torch

from fasc.diagnosis.dependence import dependence_violation
from fasc.statistics.accumulators import Covariance
from fasc.statistics.moments import GradientMoment, UnitStatistics
from tests.reference import covariance


def unit_of(x, h, weight, side):
    g = h @ weight if side == "input" else h
    moment = GradientMoment(side, Covariance(g.mean(0), covariance(g)), covariance(x, g))
    return UnitStatistics("blocks.0.a", x.shape[0], Covariance(x.mean(0), covariance(x)), moment)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=generator, dtype=torch.float64) + 3
    h = torch.randn(2000, 6, generator=generator, dtype=torch.float64)
    return x, h, torch.randn(6, 8, generator=generator, dtype=torch.float64)


def test_independent_inputs_and_gradients_score_their_noise_floor(data):
    scores = dependence_violation(unit_of(*data, "input"), data[2])
    assert scores.rho == pytest.approx(scores.floor, rel=0.25)
    assert scores.debiased < 0.6 * scores.rho
    small = dependence_violation(unit_of(data[0][:200], data[1][:200], data[2], "input"), data[2])
    assert small.floor == pytest.approx(scores.floor * 10**0.5, rel=0.1), "the floor falls as 1/√n"


def test_gradients_that_are_the_inputs_score_one(data):
    x = data[0]
    scores = dependence_violation(unit_of(x, x, torch.eye(8, dtype=torch.float64), "input"), torch.eye(8))
    assert scores.rho == pytest.approx(1)


def test_both_sides_give_the_same_score_and_scales_do_not_matter(data):
    x, h, weight = data
    h = h + 0.5 * x[:, :6]
    on_inputs = dependence_violation(unit_of(x, h, weight, "input"), weight)
    on_outputs = dependence_violation(unit_of(x, h, weight, "output"), weight)
    scaled = dependence_violation(unit_of(50 * x, 1e-4 * h, weight, "output"), weight)
    for other in (on_outputs, scaled):
        assert other.rho == pytest.approx(on_inputs.rho)
        assert other.floor == pytest.approx(on_inputs.floor)
    assert on_inputs.debiased > 3 * on_inputs.floor


def test_without_a_cross_moment_there_is_no_score(data):
    unit = unit_of(*data, "input")
    bare = replace(unit, gradient=GradientMoment("input", unit.gradient.covariance))
    assert dependence_violation(bare, data[2]) is None
    assert dependence_violation(replace(unit, gradient=None), data[2]) is None
