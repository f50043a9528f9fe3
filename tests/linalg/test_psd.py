"""Moments, damping, Cholesky and spectra against obvious code."""

import pytest
import torch

from fasc.diagnosis.spectra import effective_rank, principal_angles, rank_keeping, stable_rank
from fasc.errors import NonFiniteError, NotPositiveDefiniteError
from fasc.linalg import moments
from fasc.linalg.psd import cholesky, damped, descending_eigh
from tests.reference import covariance


@pytest.mark.parametrize("size", [5, 383, 1000])
def test_symmetric_sum_is_the_centred_second_moment_whatever_the_panels(size):
    x = torch.randn(300, size, generator=torch.Generator().manual_seed(0)) + 0.5
    total, vector = moments.SymmetricSum(size, x.device), moments.VectorSum(size, x.device)
    for part in x.split(70):
        total.add(part)
        vector.add(part)
    found = total.covariance(vector.mean(300), 300)
    torch.testing.assert_close(found, covariance(x.double()), rtol=0, atol=2e-6)
    torch.testing.assert_close(found, found.mT, rtol=0, atol=1e-12)


def test_sums_that_spill_into_float64_are_the_same_sums(monkeypatch):
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
    h = torch.randn(512, 4, generator=torch.Generator().manual_seed(1))

    def measure():
        square, vector = moments.SymmetricSum(6, x.device), moments.VectorSum(6, x.device)
        other, cross = moments.VectorSum(4, x.device), moments.CrossSum((6, 4), x.device)
        for start in range(0, 512, 32):
            rows = slice(start, start + 32)
            square.add(x[rows])
            vector.add(x[rows])
            other.add(h[rows])
            cross.add(x[rows], h[rows])
        means = vector.mean(512), other.mean(512)
        return square.covariance(means[0], 512), cross.covariance(means, 512)

    plain = measure()
    monkeypatch.setattr(moments, "FLUSH_TOKENS", 64)
    spilled = measure()
    for a, b, exact in zip(plain, spilled, (covariance(x.double()), covariance(x.double(), h.double())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(b, exact, rtol=0, atol=1e-6)


def test_reading_a_sum_twice_gives_the_same(monkeypatch):
    monkeypatch.setattr(moments, "FLUSH_TOKENS", 8)
    vector = moments.VectorSum(3, torch.device("cpu"))
    vector.add(torch.ones(12, 3))
    vector.add(torch.ones(2, 3))
    assert torch.equal(vector.mean(14), vector.mean(14))
    assert torch.equal(vector.mean(14), torch.ones(3, dtype=torch.float64))


def test_damping_has_no_unit():
    c = torch.diag(torch.tensor([4.0, 2.0, 0.0]))
    torch.testing.assert_close(damped(100 * c, 0.1), 100 * damped(c, 0.1))
    torch.testing.assert_close(damped(c, 0.1).diagonal(), torch.tensor([4.2, 2.2, 0.2]))
    assert float(c[2, 2]) == 0, "the argument is left alone"


def test_a_singular_covariance_is_an_error_that_names_the_layer_and_the_number():
    with pytest.raises(NotPositiveDefiniteError, match=r"`blocks.3.o`.*smallest eigenvalue .*1,234 tokens"):
        cholesky(torch.diag(torch.tensor([1.0, 0.0])).double(), where="`blocks.3.o`: the inputs'", tokens=1234)
    with pytest.raises(NonFiniteError, match="layer x"):
        cholesky(torch.full((2, 2), float("nan")).double(), where="layer x", tokens=1)


def test_eigenpairs_descend():
    a = torch.randn(6, 6, dtype=torch.float64)
    a = a @ a.mT
    values, vectors = descending_eigh(a)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(a @ vectors, vectors * values)


def test_ranks_of_flat_and_spiked_spectra():
    flat, spiked = torch.ones(8, dtype=torch.float64), torch.tensor([1.0] + [0.0] * 7, dtype=torch.float64)
    assert effective_rank(flat) == pytest.approx(8)
    assert effective_rank(spiked) == pytest.approx(1)
    assert stable_rank(flat) == pytest.approx(8)
    assert stable_rank(spiked) == pytest.approx(1)
    assert rank_keeping(flat, 0.5) == 4
    assert rank_keeping(spiked, 0.99) == 1
    assert rank_keeping(torch.tensor([6.0, 3.0, 1.0]), 0.9) == 2


def test_principal_angles_of_known_planes():
    a = torch.eye(4, dtype=torch.float64)[:, :2]
    t = torch.deg2rad(torch.tensor(30.0, dtype=torch.float64))
    b = torch.stack([a[:, 0], t.cos() * a[:, 1] + t.sin() * torch.eye(4, dtype=torch.float64)[:, 2]], dim=1)
    torch.testing.assert_close(principal_angles(a, 3 * b), torch.tensor([0.0, 30.0], dtype=torch.float64), rtol=0, atol=1e-5)
