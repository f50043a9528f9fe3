"""ρ: zero coupling gives its noise floor, perfect coupling gives one, and the side of the moments does not matter."""

import pytest
import torch

from fasc.statistics.moments import GradientMoment, GroupStatistics
from fasc.diagnosis.dependence import dependence_violation
from fasc.statistics.accumulators import Covariance
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer
from tests.reference import covariance


def group_of(x, h, weight, side):
    g = h @ weight if side == "input" else h
    moment = GradientMoment(side, Covariance(g.mean(0), covariance(g)), covariance(x, g))
    group = InputGroup((Layer("blocks.0.a", weight.shape[1], weight.shape[0], bias=False),))
    return GroupStatistics(group, x.shape[0], Covariance(x.mean(0), covariance(x)), {"blocks.0.a": moment})


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=generator, dtype=torch.float64) + 3
    h = torch.randn(2000, 6, generator=generator, dtype=torch.float64)
    return x, h, torch.randn(6, 8, generator=generator, dtype=torch.float64)


def test_independent_inputs_and_gradients_score_their_noise_floor(data):
    found = dependence_violation(group_of(*data, "input"), data[2])
    assert found.rho == pytest.approx(found.floor, rel=0.25)
    assert found.debiased < 0.6 * found.rho
    small = dependence_violation(group_of(data[0][:200], data[1][:200], data[2], "input"), data[2])
    assert small.floor == pytest.approx(found.floor * 10**0.5, rel=0.1), "the floor falls as 1/√n"


def test_gradients_that_are_the_inputs_score_one(data):
    x = data[0]
    found = dependence_violation(group_of(x, x, torch.eye(8, dtype=torch.float64), "input"), torch.eye(8))
    assert found.rho == pytest.approx(1)


def test_both_sides_give_the_same_score_and_scales_do_not_matter(data):
    x, h, weight = data
    h = h + 0.5 * x[:, :6]
    on_inputs = dependence_violation(group_of(x, h, weight, "input"), weight)
    on_outputs = dependence_violation(group_of(x, h, weight, "output"), weight)
    scaled = dependence_violation(group_of(50 * x, 1e-4 * h, weight, "output"), weight)
    for other in (on_outputs, scaled):
        assert other.rho == pytest.approx(on_inputs.rho)
        assert other.floor == pytest.approx(on_inputs.floor)
    assert on_inputs.debiased > 3 * on_inputs.floor


def test_no_cross_moment_no_score(data):
    statistics = group_of(*data, "input")
    bare = GradientMoment("input", statistics.gradients["blocks.0.a"].covariance)
    assert dependence_violation(GroupStatistics(statistics.group, 2000, statistics.input, {"blocks.0.a": bare}), data[2]) is None
