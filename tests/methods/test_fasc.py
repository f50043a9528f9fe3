"""The paper's objective (Eq. 1), solved: nothing else is as good by it."""

import pytest
import torch

from fasc.methods import METHODS, solver
from tests import reference
from tests.methods.problems import SHAPES, data, exact_objective, independent, statistics_of


def at(name, weight, statistics, rank, mean, **options):
    return solver(name, {"damping": 0.0, **options}).decompose(weight, statistics).truncate(rank, mean).dense()


@pytest.mark.parametrize("rank", [3, 6, 9])
def test_it_beats_random_projectors_and_every_other_method_on_its_own_objective(rank):
    x, g = independent()
    weight = torch.eye(12, dtype=torch.float64)  # then W' is the projector itself, and h = g
    statistics = statistics_of(weight, x, g)
    ours = exact_objective(x, g, at("fasc", weight, statistics, rank, x.mean(0)))
    generator = torch.Generator().manual_seed(7)
    for trial in range(200):
        basis = torch.randn(12, rank, generator=generator, dtype=torch.float64)
        other = torch.randn(12, rank, generator=generator, dtype=torch.float64) if trial % 2 else basis
        oblique = basis @ torch.linalg.solve(other.mT @ basis, other.mT)
        assert exact_objective(x, g, oblique) > ours
    others = [name for name in METHODS if reference.SURROGATE[name] is not reference.fisher_loss]
    assert len(others) == len(METHODS) - 4
    for name in others:
        assert exact_objective(x, g, at(name, weight, statistics, rank, x.mean(0))) > ours, name


@pytest.mark.parametrize("name", ["two-sided", "fasc-sketch", "two-sided-sketch"])
@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_on_one_layer_every_method_of_this_loss_is_the_same(shape, name):
    weight, x, h = data(*SHAPES[shape])
    statistics = statistics_of(weight, x, h)
    ours = at("fasc", weight, statistics, 5, x.mean(0))
    torch.testing.assert_close(at(name, weight, statistics, 5, x.mean(0)), ours)
