"""Pivoted rows: some outputs of the product as they are, the others made of them."""

import pytest
import torch

from fasc.errors import ModelError
from fasc.layouts import LAYOUTS
from tests.layouts.units import stored, unit_of

PIVOTED = LAYOUTS["pivoted"]


def test_the_pivots_of_all_layers_are_rows_of_their_products():
    case = stored("pivoted", "three layers", 4)
    assert sum(case.facts["pivots"]) == 4
    start, rows = 0, case.states[0]["down.weight"]
    for count, state, weight in zip(case.facts["pivots"], case.states, case.weights, strict=True):
        inverse = state["order"].argsort()  # places of (pivots, others) among the outputs
        torch.testing.assert_close(weight[inverse[:count]], rows[start : start + count])
        start += count


def test_a_layer_whose_rows_are_all_pivots_has_no_second_factor():
    case = stored("pivoted", "three layers, one of a single row", 4)
    assert case.facts["pivots"][1] == 1
    assert case.modules[1].up is None
    assert set(case.states[1]) == {"order", "weight"}  # the mark


def test_a_layer_without_pivots_is_made_of_the_others():
    case = stored("pivoted", "three layers, one without pivots", 4)
    assert case.facts["pivots"][1] == 0
    assert case.modules[1].up.out_features == 6


def test_the_pivots_span_what_any_choice_of_rows_spans_and_others_take_little_of_each():
    """Greedy pivoting keeps coefficients small; a bad choice of rows would need enormous ones."""
    case = stored("pivoted", "one tall layer", 4)
    assert float(case.states[0]["up.weight"].abs().max()) < 3


@pytest.mark.parametrize("counts", [None, [2, 1], [2, 1, 0], [2, 1, 2], [-1, 3, 2], [11, -7, 0], ["2", 1, 1], [True, 1, 2], "x"])
def test_pivots_that_do_not_make_the_rank_are_refused(counts):
    with pytest.raises(ModelError, match="do not make rank 4"):
        PIVOTED.check(unit_of("three layers"), 4, {"pivots": counts})


def test_a_layer_has_no_more_pivots_than_rows():
    with pytest.raises(ModelError, match=r"pivots \[4, 7, 0\] do not make rank 11"):
        PIVOTED.check(unit_of("three layers"), 11, {"pivots": [4, 7, 0]})
