"""Damping and Cholesky of covariances."""

import pytest
import torch

from fasc.errors import NonFiniteError, NotPositiveDefiniteError
from fasc.linalg.psd import cholesky, damped, descending_eigh


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
    a = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = a @ a.mT
    values, vectors = descending_eigh(a)
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(a @ vectors, vectors * values)
