"""The pivoted form says the same with fewer numbers, and its coefficients stay small."""

import pytest
import torch

from fasc.linalg.pivot import pivoted_form


@pytest.mark.parametrize("shape", [(12, 5), (7, 7), (20, 1), (9, 3)])
def test_a_pivoted_form_is_lossless_and_its_coefficients_are_bounded(shape):
    up = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    form = pivoted_form(up)
    assert sorted([*form.pivots.tolist(), *form.others.tolist()]) == list(range(shape[0]))
    assert form.coefficients.shape == (shape[0] - shape[1], shape[1])
    torch.testing.assert_close(form.coefficients @ up[form.pivots], up[form.others], rtol=0, atol=1e-10)
    largest = max(form.coefficients.abs().flatten().tolist(), default=0)
    assert largest < 2 ** shape[1], "the bound of greedy pivoting"
    assert largest < 10, "pivoting keeps them small in practice"


def test_dependent_columns_are_no_problem():
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(9, 2, generator=generator, dtype=torch.float64) @ torch.randn(2, 4, generator=generator, dtype=torch.float64)
    form = pivoted_form(up)
    assert torch.isfinite(form.coefficients).all()
    torch.testing.assert_close(form.coefficients @ up[form.pivots], up[form.others], rtol=0, atol=1e-9)
