"""Pivoted columns: some inputs as they are, the others through what they add to those."""

import pytest
import torch

from fasc.errors import ModelError
from fasc.layouts import LAYOUTS
from tests.layouts.units import empty, factors_of, stored, unit_of


def test_the_second_factor_is_the_columns_of_the_pivots():
    case = stored("pivoted-columns", "three layers", 4)
    pivots = case.states[0]["down.order"][:4].long()
    for state, weight in zip(case.states, case.weights, strict=True):
        torch.testing.assert_close(state["up.weight"], weight[:, pivots])


@pytest.mark.parametrize("assign", [True, False])
def test_another_order_of_the_inputs_is_followed(assign):
    """Loading puts another tensor in its place or writes into it."""
    case = stored("pivoted-columns", "one layer", 4)
    layer, x = case.modules[0], case.inputs(3)
    layer(x)
    turned = layer.down.order.flip(0).clone()
    layer.load_state_dict({**layer.state_dict(), "down.order": turned}, assign=assign)
    weight, bias = case.layout.dense(layer)
    torch.testing.assert_close(layer(x), x @ weight.mT + bias)
    assert not torch.allclose(weight, case.weights[0])


def test_coefficients_are_small_in_units_of_the_inputs_spread():
    """Scaling an input up makes it a pivot, and never a large coefficient of another."""
    unit = unit_of("one layer")
    layout = LAYOUTS["pivoted-columns"]
    factors, bias, inputs = factors_of(unit, 4)
    inputs.matrix[5] *= 1e3
    inputs.matrix[:, 5] *= 1e3
    encoded = layout.encode(unit, factors, bias, inputs)
    assert 5 in encoded.states[0]["down.order"][:4].tolist()
    spread = inputs.matrix.diagonal().double().sqrt()
    order = encoded.states[0]["down.order"].long()
    scaled = encoded.states[0]["down.rest.weight"] * spread[order[4:]] / spread[order[:4], None]
    assert float(scaled.abs().max()) < 3


def test_a_dead_input_is_no_pivot():
    unit = unit_of("one layer")
    layout = LAYOUTS["pivoted-columns"]
    factors, bias, inputs = factors_of(unit, 4)
    inputs.matrix[5] = inputs.matrix[:, 5] = 0
    encoded = layout.encode(unit, factors, bias, inputs)
    assert 5 not in encoded.states[0]["down.order"][:4].tolist()
    (module,) = empty(layout, unit, 4, encoded.facts)
    module.load_state_dict(encoded.states[0])
    x = torch.ones(1, 12, dtype=torch.float64)
    torch.testing.assert_close(module(x), x @ factors.dense().mT + bias)


@pytest.mark.parametrize("rank", [12, 15])
def test_at_least_one_input_is_no_pivot(rank):
    with pytest.raises(ModelError, match=f"cannot have rank {rank} in layout `pivoted-columns`"):
        LAYOUTS["pivoted-columns"].check(unit_of("three layers"), rank, {})
