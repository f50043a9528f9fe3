"""½J is what its definition says, for every method, at every rank, by whichever way it is computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fasc.errors import StatisticsError
from fasc.forecast.half_j import _at_input, fisher_loss_curve, half_tails, loss_curve, loss_curves
from fasc.methods import METHODS, solver
from fasc.model.groups import stacked_weight
from fasc.statistics.moments import as_float64
from tests.conftest import tiny_model

RANKS = (0, 1, 5, 15)


def units_of(statistics, scope):
    """Units of both sides: groups that are wider than their input, and layers that are not."""
    return [unit for group in list(statistics.groups.values())[:4] for unit in group.group.units(scope)]


def by_definition(weight, statistics, decomposition, rank):
    """½ tr(Eᵀ Σ_hh E Σ_xx), E = W − W'; gradients of the input side are Wᵀh, so E = W B there."""
    _, xx = as_float64(statistics.input)
    _, gg = as_float64(statistics.require_gradient().covariance)
    error = decomposition.up[:, rank:] @ decomposition.down[rank:]
    if statistics.require_gradient().side == "input":
        error = torch.linalg.pinv(weight) @ error
    return 0.5 * torch.trace(error.mT @ gg @ error @ xx)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_the_forecast_of_every_method_is_its_definition(statistics, name):
    model, chosen = tiny_model(), solver(name, {"damping": 1e-9})
    sides = set()
    for unit in units_of(statistics, chosen.method.scope):
        weight, moments = stacked_weight(model, unit), statistics.unit(unit)
        decomposition = chosen.decompose(weight, moments)
        curve = loss_curve(chosen, decomposition, weight, moments)
        assert len(curve) == decomposition.full_rank + 1
        for rank in RANKS:
            definition = by_definition(weight, moments, decomposition, rank)
            torch.testing.assert_close(curve[rank], definition, rtol=1e-4, atol=1e-9 * float(curve[0]))
        assert curve[-1] == 0
        sides.add(moments.require_gradient().side)
    assert sides == {"input", "output"}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"fasc", "two-sided"}))
def test_no_method_beats_fasc_on_its_own_loss(statistics, name):
    model, chosen = tiny_model(), solver(name, {"damping": 1e-9})
    best = {"group": "fasc", "layer": "two-sided"}[chosen.method.scope]
    units = units_of(statistics, chosen.method.scope)
    curves, ours = (loss_curves(model, statistics, one, units) for one in (chosen, solver(best, {"damping": 1e-9})))
    for unit in units:
        shared = min(len(curves[unit.name]), len(ours[unit.name]))
        assert (ours[unit.name][:shared] <= curves[unit.name][:shared] * (1 + 1e-4) + 1e-9 * ours[unit.name][0]).all()
        assert (np.diff(ours[unit.name]) <= 0).all()


@pytest.mark.parametrize("name", ["fasc", "two-sided"])
def test_energies_alone_give_the_curve_of_the_whole_decomposition(statistics, name):
    model, chosen = tiny_model(), solver(name)
    units = units_of(statistics, chosen.method.scope)
    quick = loss_curves(model, statistics, chosen, units)
    for unit in units:
        weight, moments = stacked_weight(model, unit), statistics.unit(unit)
        whole = loss_curve(chosen, chosen.decompose(weight, moments), weight, moments).numpy()
        np.testing.assert_allclose(quick[unit.name], whole, rtol=1e-6, atol=1e-9 * whole[0])


@pytest.mark.parametrize("name", ["fasc", "svd"])
def test_held_out_moments_forecast_the_decomposition_that_the_others_chose(statistics, held_out, name):
    model, chosen = tiny_model(), solver(name)
    units = units_of(statistics, "group")
    curves = loss_curves(model, statistics, chosen, units, held_out=held_out)
    for unit in units:
        weight = stacked_weight(model, unit)
        decomposition = chosen.decompose(weight, statistics.unit(unit))
        for rank in RANKS:
            definition = by_definition(weight, held_out.unit(unit), decomposition, rank)
            np.testing.assert_allclose(curves[unit.name][rank], float(definition), rtol=1e-4, atol=1e-9 * curves[unit.name][0])
    same = loss_curves(model, statistics, chosen, units, held_out=statistics)
    own = loss_curves(model, statistics, chosen, units)
    for unit in units:
        np.testing.assert_allclose(same[unit.name], own[unit.name], rtol=1e-2, atol=1e-4 * own[unit.name][0])


def test_a_forecast_without_gradients_is_refused(statistics):
    unit = units_of(statistics, "group")[0]
    group = statistics.groups[unit.group]
    bare = replace(statistics, groups={unit.group: replace(group, gradients={})})
    with pytest.raises(StatisticsError, match="no gradient moment"):
        loss_curves(tiny_model(), bare, solver("svd"), [unit])


def test_half_tails_are_half_of_what_is_left():
    energies = torch.tensor([4.0, 2.0, 1.0])
    assert half_tails(energies).tolist() == [3.5, 1.5, 0.5, 0.0]


@pytest.mark.parametrize("shape", [(9, 6), (6, 6), (4, 6)])
@pytest.mark.parametrize("poor", [False, True])
def test_a_weight_without_full_rank_is_forecast_all_the_same(shape, poor):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
    if poor:
        weight = weight @ torch.diag(torch.tensor([1.0, 1, 1, 1, 0, 0], dtype=torch.float64))
    inputs = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    solution = _at_input(weight, weight @ inputs)
    torch.testing.assert_close(weight @ solution, weight @ inputs)
    torch.testing.assert_close(solution, torch.linalg.pinv(weight) @ weight @ inputs)


def test_half_j_is_half_the_mean_square_of_what_an_error_adds_to_the_loss_where_inputs_and_gradients_are_independent(statistics):
    """½ E (hᵀ E x̃)² over drawn tokens, without any moment."""
    model, name = tiny_model(), "model.layers.0.self_attn.o_proj"
    unit = statistics.groups[name].group.unit()
    weight, moments = stacked_weight(model, unit), statistics.unit(unit)
    _, xx = as_float64(moments.input)
    _, gg = as_float64(moments.require_gradient().covariance)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200_000, 32, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(xx + 1e-12 * torch.eye(32)).mT
    g = torch.randn(200_000, 32, generator=generator, dtype=torch.float64) @ torch.linalg.cholesky(gg + 1e-12 * torch.eye(32)).mT
    chosen = solver("two-sided", {"damping": 1e-9})
    decomposition = chosen.decompose(weight, moments)
    curve = fisher_loss_curve(decomposition, weight, moments)
    for rank in (0, 8, 16):
        error = decomposition.up[:, rank:] @ decomposition.down[rank:]
        if moments.require_gradient().side == "input":
            error = torch.linalg.solve(weight, error)
        sampled = 0.5 * (g * (x @ error.mT)).sum(1).square().mean()
        torch.testing.assert_close(curve[rank], sampled, rtol=0.03, atol=0)
