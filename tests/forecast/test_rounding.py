"""What rounding is forecast to cost: exact for what was rounded, close before anything is."""

import pytest
import torch

from fasc.forecast.noise import noise_curves
from fasc.forecast.rounding import Rounding, factored_noise, noise_key, noise_loss, rounding_loss, rounding_share
from fasc.layouts import LAYOUTS, layouts_named
from fasc.layouts.quantised import linear_maps
from fasc.linalg.rounding import feedback, rounded, variances
from fasc.methods import solver
from fasc.model.groups import stacked_weight
from fasc.planning.needs import needs_for
from fasc.planning.options import MethodConfig
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model

DAMPING = 1e-3


@pytest.fixture(scope="module")
def statistics(tokens):
    return collect_moments(tiny_model(), tokens, needs_for(MethodConfig(bits=(4,)), None))


def problem(d_out=64, d_in=96):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, d_in, generator=generator, dtype=torch.float64)
    mix = torch.randn(d_in, d_in, generator=generator, dtype=torch.float64) / d_in**0.5
    x = x @ (torch.eye(d_in, dtype=torch.float64) + 0.7 * mix)
    h = torch.randn(1000, d_out, generator=generator, dtype=torch.float64) * torch.linspace(0.1, 1, d_out, dtype=torch.float64)
    return torch.randn(d_out, d_in, generator=generator, dtype=torch.float64), x.mT @ x / 1000, h.mT @ h / 1000


def test_with_independent_outputs_it_is_the_full_trace():
    error, moment, metric = problem()
    metric = torch.diag(metric.diagonal())
    full = 0.5 * torch.trace(error.mT @ metric @ error @ moment)
    assert rounding_loss(error, moment, metric.diagonal(), share=0.25) == pytest.approx(0.25 * float(full))


@pytest.mark.parametrize("bits", [3, 5, 8])
def test_errors_of_rounding_are_independent_enough_for_the_diagonal(bits):
    weight, moment, metric = problem()
    error = weight - rounded(weight, feedback(moment, DAMPING, where="x"), bits, 32).dense()
    full = 0.5 * torch.trace(error.mT @ metric @ error @ moment)
    assert rounding_loss(error, moment, metric.diagonal()) == pytest.approx(float(full), rel=0.1)


@pytest.mark.parametrize("bits,near", [(3, 0.2), (4, 0.15), (6, 0.1), (8, 0.1)])
def test_ranges_and_variances_forecast_what_rounding_loses(bits, near):
    weight, moment, metric = problem()
    error = weight - rounded(weight, feedback(moment, DAMPING, where="x"), bits, 32).dense()
    noise = noise_loss(weight, variances(moment, DAMPING, where="x"), metric.diagonal(), 32)
    assert noise * rounding_share(bits) == pytest.approx(rounding_loss(error, moment, metric.diagonal()), rel=near)


@pytest.mark.parametrize("layout", ["factors", "pivoted", "pivoted-columns"])
def test_it_goes_through_both_factors(layout, statistics):
    """Against each matrix really rounded, the other as it was."""
    model, chosen, how = tiny_model(), solver("fasc", {}), Rounding(16, DAMPING)
    unit = statistics.groups["model.layers.0.mlp.down_proj"].group.unit()
    moments, weight = statistics.unit(unit), stacked_weight(model, unit)
    scale = moments.extras[f"output_scale/{unit.name}"].double()
    factors = chosen.decompose(weight, moments).truncate(20, moments.input.mean.double())
    stored = LAYOUTS[layout]
    forecast = factored_noise(unit, (stored, factors), moments, [scale], how)
    encoded = stored.encode(unit, factors, torch.zeros(32, dtype=torch.float64), moments.input)
    module = stored.build(unit, 20, encoded.facts)[0].double().requires_grad_(False)
    module.load_state_dict({key: value.contiguous() for key, value in encoded.states[0].items()})
    dense, bits, total = module.weight.detach(), 8, 0.0
    for path, matrix, _ in list(linear_maps(module)):
        covariance = moments.input.matrix.double()
        reads = covariance if matrix is None else matrix.detach() @ covariance @ matrix.detach().mT
        part = module.get_submodule(path)
        kept = part.weight.detach().clone()
        part.weight.data = rounded(kept, feedback(reads, DAMPING, where="x"), bits, 16).dense()
        total += rounding_loss(dense - module.weight.detach(), moments.input.matrix, scale)
        part.weight.data = kept
    assert forecast * rounding_share(bits) == pytest.approx(total, rel=0.25)


def test_every_unit_has_a_curve_in_every_layout(statistics):
    groups = [group.group for group in statistics.groups.values()]
    units = [unit for group in groups for unit in (group.unit(), *group.units("layer"))]
    curves = noise_curves(tiny_model(), statistics, solver("fasc", {}), units, layouts_named(None), Rounding(16, DAMPING))
    for unit in units:
        assert curves[noise_key(unit.name, "dense")].shape == (1,)
        for name in {"pivoted", "pivoted-columns", "factors" if len(unit.layers) == 1 else "shared"}:
            curve = curves[noise_key(unit.name, name)]
            assert curve.shape == (min(unit.d_in, unit.d_out) + 1,)
            assert (curve > 0).all()


def test_a_unit_of_several_layers_has_the_noise_of_its_layers(statistics):
    group = next(group.group for group in statistics.groups.values() if len(group.group.layers) == 3)
    units = [group.unit(), *group.units("layer")]
    curves = noise_curves(tiny_model(), statistics, solver("fasc", {}), units, layouts_named(["dense"]), Rounding(16, DAMPING))
    whole, *parts = (float(curves[noise_key(unit.name, "dense")][0]) for unit in units)
    assert whole == pytest.approx(sum(parts))


def test_the_scale_of_the_outputs_is_the_diagonal_of_their_second_moment(statistics):
    """Where the gradient moment lies on the output side, it says the same."""
    seen = 0
    for group in statistics.groups.values():
        for layer in group.group.layers:
            gradient = group.gradients.get(layer.name)
            if gradient is not None and gradient.side == "output":
                covariance = gradient.covariance
                expected = covariance.matrix.diagonal() + covariance.mean.square()
                torch.testing.assert_close(group.extras[f"output_scale/{layer.name}"], expected, rtol=1e-4, atol=1e-9)
                seen += 1
    assert seen > 0
