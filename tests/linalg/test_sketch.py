"""Sketches of spectra: as good as they say."""

import pytest
import torch

from fasc.linalg.sketch import gaussian, residual_norms, sketch_width, sketched_eigenpairs


def spectrum(kind, d=120):
    j = torch.arange(1, d + 1, dtype=torch.float64)
    return {"fast": torch.exp(-0.15 * j), "slow": 1 / j, "flat": torch.ones(d, dtype=torch.float64)}[kind]


def operator(values, seed=0):
    g = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64))
    return (q * values) @ q.mT


@pytest.mark.parametrize("kind", ["fast", "slow", "flat"])
@pytest.mark.parametrize("seed", range(5))
def test_the_bound_holds_whatever_the_decay(kind, seed):
    values, rank = spectrum(kind), 15
    matrix = operator(values, seed)
    start = gaussian(120, 30, matrix, seed=seed)
    for power in (0, 2):
        pairs = sketched_eigenpairs(lambda v: matrix @ v, start, trace=float(matrix.trace()), power=power, seed=seed)
        lost = float(values[:rank].sum() - pairs.values[:rank].sum())
        assert -1e-9 <= lost <= pairs.lost_bound(rank) + 1e-9
        assert pairs.dropped(rank) == pytest.approx(float(values[rank:].sum()) + lost, abs=1e-8)
        estimate = pairs.lost_estimate(rank, residual_norms(lambda v: matrix @ v, pairs))
        assert 0 <= estimate <= pairs.lost_bound(rank)
        if kind == "fast" and power == 2:
            assert lost < 1e-6
            assert estimate == pytest.approx(lost, abs=1e-6)


def test_power_iterations_help_where_the_decay_is_slow():
    matrix = operator(spectrum("slow"))
    start = gaussian(120, 30, matrix, seed=0)
    energies = [
        float(sketched_eigenpairs(lambda v: matrix @ v, start, trace=1.0, power=power).values[:15].sum()) for power in (0, 1, 3)
    ]
    assert energies == sorted(energies)
    assert energies[0] < energies[2]


def test_sizes_are_those_of_the_paper():
    assert sketch_width(64, 1024, wide=False) == 128
    assert sketch_width(64, 1024, wide=True) == 256
    assert sketch_width(400, 1024, wide=True) == 512
    assert sketch_width(600, 1024, wide=False) == 1024
