"""Multiply-adds as a budget, alone and beside bytes."""

from itertools import product

import numpy as np
import pytest

from fasc.errors import BudgetError, UsageError
from fasc.layouts import layouts_named
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from fasc.options import parse
from fasc.planning.candidates import Alternative, Rules, candidates
from fasc.planning.options import BudgetConfig
from fasc.planning.two_budgets import allocate_within_both
from fasc.stages.plan import plan
from tests.conftest import tiny_model


def unit_with_options(seed):
    generator = np.random.default_rng(seed)
    unit = Unit(f"u{seed}", (Layer(f"u{seed}", 24, 32, bias=False),))
    losses = 0.01 * np.append(np.cumsum(np.sort(generator.exponential(size=24)))[::-1], 0.0)
    noise = {name: generator.uniform(0.5, 2) * np.ones(25) for name in ("dense", "factors", "pivoted")}
    layouts = tuple(layouts_named(["dense", "factors", "pivoted"]))
    how = {"cost": "bytes", "bytes_per_parameter": 2, "bits": (2, 3, 4, 6), "bits_group": 8, "counts_multiply_adds": True}
    return candidates(unit, Rules(layouts, rank_multiple=2, **how), losses, noise=noise)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share,flops", [(0.2, 0.7), (0.3, 0.5), (0.35, 0.9)])
def test_both_limits_are_kept_at_nearly_the_least_loss(seed, share, flops):
    units = [unit_with_options(2 * seed), unit_with_options(2 * seed + 1)]
    limit, most = share * sum(unit.whole for unit in units), flops * 2 * 24 * 32
    best = min(
        sum(unit.losses[pick] for unit, pick in zip(units, picks, strict=True))
        for picks in product(*(range(len(unit.costs)) for unit in units))
        if sum(unit.costs[pick] for unit, pick in zip(units, picks, strict=True)) <= limit
        and sum(unit.multiply_adds[pick] for unit, pick in zip(units, picks, strict=True)) <= most
    )
    made = allocate_within_both([[Alternative((unit,))] for unit in units], limit, most)
    picks = [options[0] for _, options in made.picks]
    assert sum(unit.costs[pick] for unit, pick in zip(units, picks, strict=True)) <= limit
    assert sum(unit.multiply_adds[pick] for unit, pick in zip(units, picks, strict=True)) <= most
    assert best <= made.objective <= 1.15 * best  # two units have few totals between the vertices of the hull


def test_a_limit_that_does_not_bind_changes_nothing(statistics):
    one = plan(tiny_model(), statistics, param_fraction=0.7)
    both = plan(tiny_model(), statistics, param_fraction=0.7, flop_fraction=1.0)
    assert both.edits == one.edits


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_the_fraction_of_multiply_adds_is_kept(statistics, fraction):
    alone = plan(tiny_model(), statistics, flop_fraction=fraction)
    assert alone.totals["multiply_add_fraction"] <= fraction
    beside = plan(tiny_model(), statistics, param_fraction=0.9, flop_fraction=fraction)
    assert beside.totals["multiply_add_fraction"] <= fraction
    assert beside.totals["param_fraction"] <= 0.9
    assert beside.predicted_loss >= alone.predicted_loss * (1 - 1e-6)


def test_limits_that_contradict_each_other_are_refused_with_the_least_that_is_possible(statistics):
    with pytest.raises(BudgetError, match="fewest are"):
        plan(tiny_model(), statistics, param_fraction=0.9, flop_fraction=0.001)


@pytest.mark.parametrize("others", [{"max_kl": 0.1}, {"rank_fraction": 0.5}, {"param_fraction": 0.5, "max_bytes": 10}])
def test_only_a_budget_of_size_goes_with_multiply_adds(others):
    with pytest.raises(UsageError, match="are both budgets"):
        parse(BudgetConfig, {"flop_fraction": 0.8, **others}, "budget")
    assert BudgetConfig(param_fraction=0.5, flop_fraction=0.8).label == "params0.5-flops0.8"
