"""Bits as options of every unit: one allocation with ranks and layouts, by bytes."""

from itertools import product

import numpy as np
import pytest

from fasc.edits.quantise import Quantise
from fasc.errors import BudgetError
from fasc.layouts import layouts_named
from fasc.layouts.quantised import quantised_bytes
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from fasc.planning.candidates import Alternative, Rules, candidates
from fasc.planning.lagrangian import allocate_by_loss
from fasc.planning.needs import needs_for
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.stages.plan import plan
from fasc.statistics.collect import collect_moments
from tests.conftest import tiny_model


@pytest.fixture(scope="module")
def measured(tokens):
    return collect_moments(tiny_model(), tokens, needs_for(MethodConfig(bits=(4,)), None))


def unit_with_options(seed, bits=(2, 3, 4, 6, 16), layouts=("dense", "factors"), **others):
    """A small layer with a random convex loss by rank, and noise."""
    generator = np.random.default_rng(seed)
    unit = Unit(f"u{seed}", (Layer(f"u{seed}", 24, 32, bias=False),))
    energies = np.sort(generator.exponential(size=24))[::-1]
    losses = 0.01 * np.append(np.cumsum(energies[::-1])[::-1], 0.0)
    noise = {name: generator.uniform(0.5, 2) * np.linspace(1, 3, 25) for name in layouts}
    rules = Rules(
        tuple(layouts_named(layouts)), rank_multiple=4, cost="bytes", bytes_per_parameter=2, bits=bits, bits_group=8, **others
    )
    return candidates(unit, rules, losses, noise=noise)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.2, 0.35, 0.6])
def test_the_joint_choice_is_that_of_brute_force(seed, share):
    units = [unit_with_options(3 * seed + one) for one in range(3)]
    limit = share * sum(unit.whole for unit in units)
    best = min(
        sum(unit.losses[pick] for unit, pick in zip(units, picks, strict=True))
        for picks in product(*(range(len(unit.costs)) for unit in units))
        if sum(unit.costs[pick] for unit, pick in zip(units, picks, strict=True)) <= limit
    )
    made = allocate_by_loss([[Alternative((unit,))] for unit in units], limit, limited="cost")
    assert best <= made.objective <= 1.005 * best


def test_options_are_every_layout_and_rank_in_every_number_of_bits():
    options = unit_with_options(0, counts_multiply_adds=True)
    dense = [bits for bits, layout in zip(options.bits, options.layouts, strict=True) if layout.leaves_dense]
    assert sorted(dense) == [0, 2, 3, 4, 6]
    assert (np.diff(options.costs) >= 0).all()
    assert (options.roundings[options.bits == 0] == 0).all()
    assert (options.roundings[options.bits > 0] > 0).all()


def test_options_that_cost_more_and_lose_no_less_are_left_out_where_nothing_else_counts():
    everything, few = unit_with_options(2, counts_multiply_adds=True), unit_with_options(2)
    best = np.minimum.accumulate(everything.losses)
    assert (np.diff(few.losses) < 0).all()
    assert {float(one) for one in best} == {float(one) for one in few.losses}


def test_the_cost_of_an_option_is_what_its_edits_leave():
    options = unit_with_options(1)
    for index in range(len(options.costs)):
        edits = options.edits(index, _Chosen())
        assert options.costs[index] == options.whole - sum(edit.saved_bytes(2) for edit in edits)
        forecast = sum(edit.predicted_loss for edit in edits)
        assert forecast == pytest.approx(options.losses[index])


class _Chosen:
    """A method, for the name in an edit."""

    name = "fasc"

    class options:  # noqa: N801
        @staticmethod
        def model_dump(mode):
            return {}


def test_bytes_of_a_matrix_count_codes_scales_and_zeros():
    assert quantised_bytes(64, 10, 4, 64) == 10 * 32 + 10 * 2 + 8
    assert quantised_bytes(65, 1, 3, 64) == 27 + 2 * 2 + 3


def test_a_layer_that_costs_more_gets_more_bits(measured):
    made = plan(tiny_model(), measured, layouts=("dense",), bits=(2, 4, 8), bits_group=16, max_bytes=44_000)
    bits = {name: edit.bits for edit in made.edits for name in edit.layers}
    assert set(bits) == {layer.name for layer in made.layers}
    assert len(set(bits.values())) > 1


def test_without_16_in_the_menu_everything_is_rounded_and_with_it_what_the_budget_allows_is_not(measured):
    ample = 10**7
    assert len(plan(tiny_model(), measured, bits=(4,), bits_group=16, layouts=("dense",), max_bytes=ample).edits) > 0
    assert not plan(tiny_model(), measured, bits=(4, 16), bits_group=16, layouts=("dense",), max_bytes=ample).edits


@pytest.mark.parametrize("budget", [{"max_kl": 0.05}, {"max_perplexity_increase": "10%"}])
def test_a_limit_of_the_loss_is_kept_by_ranks_and_bits_together(measured, budget):
    made = plan(tiny_model(), measured, bits=(3, 4, 6, 8), bits_group=16, **budget)
    assert made.predicted_loss <= BudgetConfig(**budget).loss_limit * (1 + 1e-9)
    assert any(isinstance(edit, Quantise) for edit in made.edits)
    assert made.totals["bytes"] < plan(tiny_model(), measured, **budget).totals["bytes"]


def test_more_to_choose_from_loses_no_more(measured):
    losses = [
        plan(tiny_model(), measured, bits=bits, bits_group=16, layouts=layouts, max_bytes=58_000).predicted_loss
        for bits, layouts in [((4,), ("dense",)), ((3, 4, 6), ("dense",)), ((3, 4, 6), ("dense", "factors", "pivoted"))]
    ]
    rounding = 1 + 1e-12  # the same choice is summed in another order
    assert losses[0] * rounding >= losses[1] and losses[1] * rounding >= losses[2]


@pytest.mark.parametrize(
    "options,words",
    [
        ({"bits": (4,), "param_fraction": 0.5}, "param_fraction counts weights"),
        ({"bits": (4,)}, "rank_fraction counts weights"),
        ({"bits": (9,), "max_bytes": 50_000}, "cannot be rounded to 9 bits"),
        ({"bits": (4,), "max_bytes": 50_000, "method": "svd"}, "`svd`"),
        ({"bits": (4,), "max_bytes": 50_000, "propagate": True}, "no propagation"),
        ({"bits": (2,), "max_bytes": 30_000}, "smallest possible plan|leaves nothing"),
    ],
)
def test_what_no_bits_can_give_is_refused_with_a_way_out(measured, options, words):
    with pytest.raises(BudgetError, match=words) as problem:
        plan(tiny_model(), measured, **options)
    assert "hint" in str(problem.value)


def test_statistics_without_the_scale_of_the_outputs_are_refused(tokens):
    plain = collect_moments(tiny_model(), tokens, needs_for(MethodConfig(), BudgetConfig(param_fraction=0.5)))
    with pytest.raises(Exception, match="output_scale"):
        plan(tiny_model(), plain, bits=(4,), max_bytes=50_000)
