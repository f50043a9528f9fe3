"""Rounding with error feedback: exact cases, and no row ever worse than to nearest."""

import pytest
import torch

from fasc.errors import NotPositiveDefiniteError
from fasc.linalg.rounding import (
    feedback,
    fit_grid,
    half,
    refit_scales,
    round_to_nearest,
    round_with_feedback,
    rounded,
    row_losses,
    variances,
)


def problem(seed, d_out=12, d_in=40, tokens=200):
    """A weight, and the second moment of correlated inputs of different size."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64)
    x = (
        torch.randn(tokens, d_in, generator=generator, dtype=torch.float64)
        @ mix
        * torch.logspace(-1, 1, d_in, dtype=torch.float64)
    )
    return torch.randn(d_out, d_in, generator=generator, dtype=torch.float64), x.mT @ x / tokens


def on_grid(d_out, d_in, bits, group):
    """A weight that a grid holds exactly: every group has the lowest and the highest code."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (d_out, d_in), generator=generator).double()
    codes[:, ::group], codes[:, 1::group] = 0, 2**bits - 1
    scales = half(torch.rand(d_out, -(-d_in // group), generator=generator, dtype=torch.float64) + 0.5)
    zeros = torch.randint(2**bits, scales.shape, generator=generator).double()
    place = torch.arange(d_in) // group
    return scales[:, place] * (codes - zeros[:, place])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("group", [8, 16])
def test_a_weight_on_a_grid_is_rounded_to_itself(bits, group):
    weight = on_grid(6, 40, bits, group)
    _, moment = problem(0)
    torch.testing.assert_close(rounded(weight, feedback(moment, 1e-3, where="x"), bits, group).dense(), weight)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_no_row_loses_more_than_rounding_to_nearest_and_all_together_lose_less(seed, bits):
    weight, moment = problem(seed)
    inputs = feedback(moment, 1e-4, where="x")
    nearest = round_to_nearest(weight, fit_grid(weight, inputs.variances, bits, 16))
    best, plain = (row_losses(weight, one, inputs.moment) for one in (rounded(weight, inputs, bits, 16), nearest))
    assert (best <= plain).all()
    assert best.sum() < 0.8 * plain.sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_refitted_scales_lose_no_more_in_any_row(bits):
    weight, moment = problem(3)
    inputs = feedback(moment, 1e-4, where="x")
    plain = round_with_feedback(weight, inputs, fit_grid(weight, inputs.variances, bits, 16))
    before, after = (row_losses(weight, one, inputs.moment) for one in (plain, refit_scales(weight, plain, inputs.moment)))
    assert (after <= before).all()
    assert after.sum() < before.sum()


def test_the_loss_of_error_feedback_is_the_sum_of_errors_over_the_factor():
    """The identity that the forecast rests on, against plain column-by-column code."""
    weight, moment = problem(1)
    inputs = feedback(moment, 1e-3, where="x")
    grid = fit_grid(weight, inputs.variances, 3, 16)
    result = round_with_feedback(weight, inputs, grid)
    left, total = weight[:, inputs.order].clone(), torch.zeros(len(weight), dtype=torch.float64)
    for j, i in enumerate(inputs.order.tolist()):
        error = (left[:, j] - result.dense()[:, i]) / inputs.factor[j, j]
        left -= torch.outer(error, inputs.factor[j])
        total += error.square()
    torch.testing.assert_close(row_losses(weight, result, inputs.moment), total)


def test_variances_are_those_of_each_input_given_the_later_ones():
    _, moment = problem(2, d_in=6)
    inputs = feedback(moment, 0.0, where="x")
    order = inputs.order.tolist()
    for j, i in enumerate(order):
        later = order[j + 1 :]
        own = moment[i, i]
        if later:
            cross = moment[i, later]
            own = own - cross @ torch.linalg.solve(moment[later][:, later], cross)
        torch.testing.assert_close(inputs.variances[i], own)
    torch.testing.assert_close(variances(moment, 0.0, where="x"), inputs.variances)


def test_uncorrelated_inputs_are_rounded_to_nearest():
    weight, _ = problem(4)
    inputs = feedback(torch.diag(torch.rand(40, dtype=torch.float64) + 0.1), 0.0, where="x")
    grid = fit_grid(weight, inputs.variances, 4, 16)
    assert torch.equal(round_with_feedback(weight, inputs, grid).codes, round_to_nearest(weight, grid).codes)


def test_the_last_group_has_the_inputs_that_are_left():
    weight, moment = problem(5)
    inputs = feedback(moment, 1e-3, where="x")
    assert rounded(weight, inputs, 8, 16).grid.scales.shape == (12, 3)
    nearest = round_to_nearest(weight, fit_grid(weight, inputs.variances, 8, 16))
    step = nearest.grid.scales[:, torch.arange(40) // 16]
    assert ((weight - nearest.dense()).abs() < step).all()


def test_a_singular_moment_is_refused_by_name():
    with pytest.raises(NotPositiveDefiniteError, match="layer 7"):
        feedback(torch.zeros(4, 4, dtype=torch.float64), 0.0, where="layer 7", tokens=3)


def test_a_row_of_zeros_stays_zero():
    weight, moment = problem(6)
    weight[3] = 0
    assert rounded(weight, feedback(moment, 1e-3, where="x"), 3, 16).dense()[3].abs().max() == 0
