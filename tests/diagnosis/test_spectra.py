"""Spectra of known matrices."""

import pytest
import torch

from fasc.diagnosis.spectra import effective_rank, principal_angles, rank_keeping, stable_rank


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
