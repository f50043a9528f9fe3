"""The interval of ρ, and how ρ falls with the tokens it is measured on."""

import numpy as np
import pytest
import torch

from fasc.diagnosis.bootstrap import rho_by_tokens, rho_interval
from fasc.statistics.extras import SKETCH
from tests.diagnosis.sketches import sketches_of


def rho_of(x, g):
    centred, gradients = x - x.mean(0), g - g.mean(0)
    cross, xx, gg = centred.mT @ gradients, centred.mT @ centred, gradients.mT @ gradients
    return float(cross.norm() / (xx.norm() * gg.norm()).sqrt())


def test_the_interval_agrees_with_a_bootstrap_on_the_data_itself():
    """Against resampling the tokens' own sequences, without any sketch: never narrower."""
    g = torch.Generator().manual_seed(0)
    sequences, length, d = 40, 8, 64
    x = torch.randn(sequences * length, d, generator=g) + torch.randn(sequences, 1, d, generator=g).expand(
        -1, length, -1
    ).flatten(0, 1)
    h = 0.5 * x + torch.randn(sequences * length, d, generator=g)
    rho = rho_of(x, h)
    low, high = rho_interval(sketches_of(x, h, sequences), rho)
    rng = np.random.default_rng(1)
    slow = []
    for _ in range(300):
        picks = torch.from_numpy(rng.integers(sequences, size=sequences))
        rows = (picks[:, None] * length + torch.arange(length)).flatten()
        slow.append(rho_of(x[rows], h[rows]))
    by_hand = np.quantile(slow, [0.025, 0.5, 0.975])
    assert low < rho < high
    exact = (by_hand[2] - by_hand[0]) * rho / by_hand[1]
    assert 0.9 * exact < high - low < 1.7 * exact, "the sketch's own noise can only widen it"


def test_sketches_are_linear_and_keep_norms():
    g = torch.Generator().manual_seed(0)
    x, h = torch.randn(60, 40, generator=g), torch.randn(60, 40, generator=g)
    whole, parts = sketches_of(x, h, 1), sketches_of(x, h, 6)
    torch.testing.assert_close(parts["sequences/xg"].sum(0), whole["sequences/xg"][0], rtol=1e-4, atol=1e-4)
    assert parts["sequences/xg"].shape == (6, SKETCH, SKETCH)
    assert float(whole["sequences/xg"].norm() / (x.mT @ h).norm()) == pytest.approx(1, abs=0.25)


def test_more_sequences_narrow_the_interval():
    g = torch.Generator().manual_seed(0)
    widths = []
    for sequences in (16, 64, 256):
        x = torch.randn(sequences * 8, 16, generator=g)
        h = x + torch.randn(sequences * 8, 16, generator=g)
        rho = rho_of(x, h)
        low, high = rho_interval(sketches_of(x, h, sequences), rho)
        widths.append(high - low)
    assert widths[0] > widths[1] > widths[2]


def test_one_sequence_has_no_interval():
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
    assert rho_interval(sketches_of(x, x, 1), 0.5) == (0.5, 0.5)


def test_noise_falls_with_the_tokens_and_dependence_stays():
    generator = torch.Generator().manual_seed(0)
    rho = {}
    for coupled in (False, True):
        x = torch.randn(64 * 20, 24, generator=generator)
        g = torch.randn(64 * 20, 24, generator=generator) + (x if coupled else 0)
        rho[coupled] = rho_by_tokens(sketches_of(x, g, 64), 0.5)
        assert list(rho[coupled]) == [160, 320, 640, 1280]
        assert rho[coupled][1280] == pytest.approx(0.5)
    assert rho[False][160] == pytest.approx(0.5 * 8**0.5, rel=0.2), "1/√n"
    assert rho[True][160] == pytest.approx(0.5, rel=0.25)
