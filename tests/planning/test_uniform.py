"""The uniform allocation: as near to the same share everywhere as a step allows, and never above."""

import numpy as np
import pytest

from fasc.errors import BudgetError
from fasc.layouts import layouts_named
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from fasc.planning.candidates import Rules, candidates
from fasc.planning.uniform import allocate_uniformly, uniform_share_for_loss


def options_of(d_in, d_out, losses=None, **rules):
    unit = Unit("u", (Layer("u", d_in, d_out, bias=False),))
    return candidates(unit, Rules(tuple(layouts_named(["factors", "dense"])), **rules), losses)


def spent(units, picks):
    return sum(unit.costs[pick] for unit, pick in zip(units, picks, strict=True)) / sum(unit.whole for unit in units)


def test_a_uniform_plan_spends_what_rounding_left():
    units = [options_of(256, 256, rank_multiple=8)] * 20
    picks = allocate_uniformly(units, 0.6)
    assert 0.597 < spent(units, picks) <= 0.6
    assert max(picks) - min(picks) <= 1


@pytest.mark.parametrize("share", [0.3, 0.55, 0.8, 1.0])
def test_every_unit_is_within_one_step_of_the_share(share):
    units = [options_of(d_in, d_out) for d_in, d_out in ((32, 96), (64, 64), (96, 32), (48, 20))]
    picks = allocate_uniformly(units, share)
    assert spent(units, picks) <= share + 1e-9
    for unit, pick in zip(units, picks, strict=True):
        target = share * unit.whole
        below = unit.costs[max(pick - 1, 0)]
        above = unit.costs[min(pick + 1, len(unit.costs) - 1)]
        assert below <= target
        assert above >= target * (1 - 1e-9)


def test_a_share_that_leaves_no_direction_says_the_least_that_does():
    units = [options_of(64, 64), options_of(8, 64)]
    least = max(unit.costs[0] / unit.whole for unit in units)
    with pytest.raises(BudgetError, match=r"leaves no direction of `u` \(64×8\)") as refused:
        allocate_uniformly(units, least * 0.99)
    named = float(refused.value.hint.rpartition(" ")[2])
    assert least <= named < least + 1e-4
    assert allocate_uniformly(units, named)


def test_the_share_for_a_loss_is_the_smallest_that_keeps_it():
    rng = np.random.default_rng(0)
    units = [options_of(32, 32, np.append(np.sort(rng.exponential(1, 32))[::-1], 0.0)) for _ in range(6)]

    def loss(share):
        return sum(unit.losses[pick] for unit, pick in zip(units, allocate_uniformly(units, share), strict=True))

    for most in (0.3, 1.0, 3.0):
        share = uniform_share_for_loss(units, most)
        assert loss(share) <= most
        assert loss(share - 1e-3) > most
    assert loss(uniform_share_for_loss(units, 100.0)) == loss(max(unit.costs[0] / unit.whole for unit in units))
