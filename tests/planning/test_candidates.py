"""A unit's options: the ranks that the rules allow, each in its cheapest layout."""

import numpy as np
import pytest

from fasc.layouts import LAYOUTS, layouts_named
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from fasc.planning.candidates import Rules, candidates


def layer(name, d_in, d_out, bias=False):
    return Layer(name, d_in, d_out, bias=bias)


def rules(*names, **others):
    return Rules(tuple(layouts_named(names or None)), **others)


def test_ranks_are_multiples_where_layers_are_wide_enough():
    wide, narrow = Unit("w", (layer("w", 256, 512),)), Unit("n", (layer("n", 64, 64),))
    assert all(rank % 8 == 0 for rank in candidates(wide, rules("pivoted", "dense", rank_multiple=8)).ranks)
    assert 3 in candidates(narrow, rules("pivoted", rank_multiple=8)).ranks


@pytest.mark.parametrize("d_in,d_out", [(24, 64), (64, 24), (32, 32)])
def test_every_rank_is_in_the_smallest_layout_and_below_the_dense_size(d_in, d_out):
    unit = Unit("u", (layer("u", d_in, d_out, bias=True),))
    options = candidates(unit, rules())
    assert options.layouts[-1].leaves_dense
    assert options.costs[-1] == options.whole == unit.parameters
    assert (np.diff(options.costs) >= 0).all()
    below = {}
    for rank in range(1, min(d_in, d_out)):
        sizes = [LAYOUTS[name].parameters(unit, rank) for name in ("factors", "pivoted", "pivoted-columns")]
        if min(sizes) < unit.parameters:
            below[rank] = min(sizes)
    assert dict(zip(options.ranks[:-1].tolist(), options.costs[:-1].tolist(), strict=True)) == below


def test_a_rank_that_saves_nothing_is_left_out_or_merged():
    unit = Unit("u", (layer("u", 24, 24),))
    saves = [rank for rank in range(1, 24) if LAYOUTS["factors"].parameters(unit, rank) < unit.parameters]
    assert candidates(unit, rules("factors")).ranks.tolist() == saves
    merged = candidates(unit, rules("factors", "merged"))
    assert sorted(merged.ranks) == list(range(1, 24))
    last_resorts = {rank for rank, one in zip(merged.ranks, merged.layouts, strict=True) if one.last_resort}
    assert last_resorts == set(range(1, 24)) - set(saves)


def test_a_floor_is_a_share_of_what_the_layers_had_before_they_lost_channels():
    unit = Unit("u", (layer("u", 32, 32),))
    assert candidates(unit, rules(floor=0.5)).costs[0] >= 0.5 * unit.parameters
    assert candidates(unit, rules(floor=0.5), dense_parameters=1200).costs[0] >= 600


def test_costs_are_ranks_parameters_or_bytes_as_the_budget_asks():
    unit = Unit("u", tuple(layer(name, 32, 16, bias=True) for name in "abc"))
    counted = {
        cost: candidates(unit, rules("pivoted", cost=cost, bytes_per_parameter=2)) for cost in ("rank", "parameters", "bytes")
    }
    at = {cost: dict(zip(options.ranks.tolist(), options.costs.tolist(), strict=True)) for cost, options in counted.items()}
    assert at["rank"][5] == 5
    assert at["parameters"][5] == 5 * (32 + 48) - 25 + 48 + 48
    assert at["bytes"][5] == 2 * (5 * (32 + 48) - 25 + 48) + 4 * 48, "an order is int32 whatever the weights are"


def test_losses_follow_their_ranks_and_dense_loses_nothing():
    unit = Unit("u", (layer("u", 16, 16),))
    losses = np.linspace(1, 0, 17) ** 2
    options = candidates(unit, rules(), losses)
    for rank, layout, loss in zip(options.ranks, options.layouts, options.losses, strict=True):
        assert loss == (0 if layout.leaves_dense else losses[rank])


def test_an_overhead_is_counted_for_every_product_that_a_layout_adds():
    unit = Unit("u", (layer("u", 32, 32),))
    options = candidates(unit, rules(overhead=100.0, cost="bytes", bytes_per_parameter=2))
    expected = [0.0 if one.leaves_dense else 200.0 for one in options.layouts]
    assert options.overheads.tolist() == expected
    assert not candidates(unit, rules(overhead=100.0, cost="rank")).overheads.any(), "ranks weigh nothing"
