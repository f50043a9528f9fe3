"""The two solvers behind every method have one optimum."""

import pytest
import torch

from fasc.linalg.decomposition import (
    conjugated,
    decompose_on_inputs,
    decompose_on_outputs,
    energies_on_inputs,
    energies_on_outputs,
)
from tests import reference
from tests.methods.problems import SHAPES, data


@pytest.fixture(params=sorted(SHAPES))
def both(request):
    weight, x, h = data(*SHAPES[request.param])
    covariance_x, covariance_h = reference.covariance(x), reference.covariance(h)
    on_inputs = torch.linalg.cholesky(covariance_x), weight.mT @ covariance_h @ weight
    on_outputs = covariance_x, torch.linalg.cholesky(covariance_h)
    return weight, x.mean(0), on_inputs, on_outputs


def test_the_two_sides_have_the_same_optimum(both):
    weight, mean, on_inputs, on_outputs = both
    one, other = decompose_on_inputs(weight, *on_inputs), decompose_on_outputs(weight, *on_outputs)
    for rank in (1, 4, 8):
        torch.testing.assert_close(one.truncate(rank, mean).dense(), other.truncate(rank, mean).dense(), rtol=0, atol=1e-6)
    least = min(weight.shape)
    torch.testing.assert_close(one.energies[:least], other.energies[:least], rtol=1e-6, atol=1e-9)


def test_a_product_with_a_wide_covariance_is_the_plain_one_in_panels(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(5, 23, generator=generator, dtype=torch.float64)
    covariance = torch.randn(23, 23, generator=generator)
    plain = a @ covariance.double() @ a.mT
    assert torch.equal(conjugated(a, covariance), plain), "one panel gives the same bits"
    for panel in (1, 7, 22, 23, 24):
        monkeypatch.setattr("fasc.linalg.decomposition._PANEL", panel)
        torch.testing.assert_close(conjugated(a, covariance), plain, rtol=1e-12, atol=1e-12)


def test_energies_alone_are_those_of_the_decomposition(both):
    weight, _, on_inputs, on_outputs = both
    torch.testing.assert_close(energies_on_inputs(*on_inputs), decompose_on_inputs(weight, *on_inputs).energies)
    torch.testing.assert_close(energies_on_outputs(weight, *on_outputs), decompose_on_outputs(weight, *on_outputs).energies)


def test_a_truncation_keeps_the_mean_or_meets_the_one_that_is_asked_for(both):
    weight, mean, on_inputs, _ = both
    full = decompose_on_inputs(weight, *on_inputs)
    own, asked = full.truncate(3, mean), full.truncate(3, mean, target_mean=torch.ones(len(weight), dtype=torch.float64))
    torch.testing.assert_close(own.dense() @ mean + own.offset, weight @ mean)
    torch.testing.assert_close(asked.dense() @ mean + asked.offset, torch.ones(len(weight), dtype=torch.float64))
    assert full.full_rank == len(full.energies)
