"""Running sums against means and covariances of what was kept whole."""

import pytest
import torch

from fasc.statistics import accumulators
from fasc.statistics.accumulators import CrossSum, SymmetricSum, VectorSum
from tests.reference import covariance


@pytest.mark.parametrize("size", [5, 383, 1000])
def test_symmetric_sum_is_the_centred_second_moment_whatever_the_panels(size):
    x = torch.randn(300, size, generator=torch.Generator().manual_seed(0)) + 0.5
    total, vector = SymmetricSum(size, x.device), VectorSum(size, x.device)
    for part in x.split(70):
        total.add(part)
        vector.add(part)
    matrix = total.covariance(vector.mean(300), 300)
    torch.testing.assert_close(matrix, covariance(x.double()), rtol=0, atol=2e-6)
    torch.testing.assert_close(matrix, matrix.mT, rtol=0, atol=1e-12)


def test_sums_that_spill_into_float64_are_the_same_sums(monkeypatch):
    x = torch.randn(512, 6, generator=torch.Generator().manual_seed(0))
    h = torch.randn(512, 4, generator=torch.Generator().manual_seed(1))

    def measure():
        square, vector = SymmetricSum(6, x.device), VectorSum(6, x.device)
        other, cross = VectorSum(4, x.device), CrossSum((6, 4), x.device)
        for start in range(0, 512, 32):
            rows = slice(start, start + 32)
            square.add(x[rows])
            vector.add(x[rows])
            other.add(h[rows])
            cross.add(x[rows], h[rows])
        means = vector.mean(512), other.mean(512)
        return square.covariance(means[0], 512), cross.covariance(means, 512)

    plain = measure()
    monkeypatch.setattr(accumulators, "FLUSH_TOKENS", 64)
    spilled = measure()
    for a, b, exact in zip(plain, spilled, (covariance(x.double()), covariance(x.double(), h.double())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        torch.testing.assert_close(b, exact, rtol=0, atol=1e-6)


def test_reading_a_sum_twice_gives_the_same(monkeypatch):
    monkeypatch.setattr(accumulators, "FLUSH_TOKENS", 8)
    vector = VectorSum(3, torch.device("cpu"))
    vector.add(torch.ones(12, 3))
    vector.add(torch.ones(2, 3))
    assert torch.equal(vector.mean(14), vector.mean(14))
    assert torch.equal(vector.mean(14), torch.ones(3, dtype=torch.float64))
