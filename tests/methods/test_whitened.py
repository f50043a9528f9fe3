"""SVD-LLM."""

import torch

from fasc.methods import solver
from tests import reference
from tests.methods.problems import data, statistics_of


def test_whitened_is_the_svd_of_the_whitened_weight():
    weight, x, h = data(20, 9)
    values, vectors = torch.linalg.eigh(reference.covariance(x))
    root = vectors @ torch.diag(values.sqrt()) @ vectors.mT
    u, s, vh = torch.linalg.svd(weight @ root, full_matrices=False)
    expected = (u[:, :4] * s[:4]) @ vh[:4] @ torch.linalg.inv(root)
    ours = solver("whitened", {"damping": 0.0}).decompose(weight, statistics_of(weight, x, h)).truncate(4, x.mean(0)).dense()
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-8)
