"""The allocator is as good as brute force, also where options have overheads and alternatives lose something themselves."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from fasc.edits.narrow import Narrow, Shape
from fasc.errors import BudgetError
from fasc.layouts import LAYOUTS, layouts_named
from fasc.model.groups import Unit
from fasc.model.layers import Layer
from fasc.planning.candidates import Alternative, Candidates, Rules, candidates
from fasc.planning.lagrangian import allocate_by_loss


def unit_of(d_in, d_out):
    return Unit("u", (Layer("u", d_in, d_out, bias=False),))


def random_candidates(rng, options):
    """Costs ascend and losses descend to 0."""
    losses = np.sort(rng.exponential(1, options))[::-1].copy()
    losses[-1] = 0
    costs = np.sort(rng.uniform(1, 100, options))
    return Candidates(unit_of(8, 8), np.arange(options), (LAYOUTS["factors"],) * options, costs, losses, 100.0)


def narrowing(loss):
    """Half of the channels, for so much."""
    producers = (Shape("up", 8, 8, False),)
    return Narrow(producers=producers, consumer=Shape("down", 8, 8, False), channels=8, width=4, predicted_loss=loss)


def totals_of(alternative):
    """Cost and loss of every choice of options."""
    for pick in itertools.product(*(range(len(unit.costs)) for unit in alternative.units)):
        parts = list(zip(alternative.units, pick, strict=True))
        yield (
            alternative.cost + sum(unit.costs[i] for unit, i in parts),
            alternative.loss + sum(unit.losses[i] for unit, i in parts),
        )


def brute_force(groups, limit, limited):
    """The best of all combinations, or ``None`` if none is within the limit."""
    cost, loss = (0, 1) if limited == "cost" else (1, 0)
    choices = [[total for alternative in group for total in totals_of(alternative)] for group in groups]
    return min(
        (sum(one[loss] for one in taken) for taken in itertools.product(*choices) if sum(one[cost] for one in taken) <= limit),
        default=None,
    )


def random_groups(rng):
    for _ in range(3):
        alternatives = [Alternative(tuple(random_candidates(rng, 4) for _ in range(rng.integers(1, 3))))]
        if rng.random() < 0.5:  # one projector for all layers
            alternatives.insert(0, Alternative((random_candidates(rng, 5),)))
        for _ in range(rng.integers(0, 3)):  # an MLP with fewer channels, which itself loses something
            units = tuple(random_candidates(rng, 3) for _ in range(2))
            alternatives.append(Alternative(units, (narrowing(float(rng.exponential(0.3))),), float(rng.integers(0, 3))))
        yield tuple(alternatives)


def most(alternative, limited):
    if limited == "cost":
        return alternative.cost + sum(float(unit.costs.max()) for unit in alternative.units)
    return alternative.loss + sum(float(unit.losses.max()) for unit in alternative.units)


@pytest.mark.parametrize("limited", ["cost", "loss"])
def test_the_allocation_is_within_half_a_percent_of_brute_force_and_within_the_limit(limited):
    rng = np.random.default_rng(0)
    compared = refused = 0
    for _ in range(40):
        groups = list(random_groups(rng))
        limit = sum(max(most(alternative, limited) for alternative in group) for group in groups) * rng.uniform(0.1, 0.9)
        best = brute_force(groups, limit, limited)
        if best is None:
            refused += 1
            with pytest.raises(BudgetError, match="smallest possible plan"):
                allocate_by_loss(groups, limit, limited=limited)
            continue
        compared += 1
        allocation = allocate_by_loss(groups, limit, limited=limited)
        assert allocation.objective <= 1.005 * best + 1e-12
        assert allocation.lower_bound <= best + 1e-9
        cost, loss = 0.0, 0.0
        for group, (which, options) in zip(groups, allocation.picks, strict=True):
            loss += group[which].loss
            cost += group[which].cost + sum(unit.costs[i] for unit, i in zip(group[which].units, options, strict=True))
            loss += sum(unit.losses[i] for unit, i in zip(group[which].units, options, strict=True))
        assert (cost if limited == "cost" else loss) <= limit * (1 + 1e-9)
        assert allocation.objective == pytest.approx(loss if limited == "cost" else cost)
    assert compared > 20
    assert refused or limited == "loss"


@pytest.mark.parametrize("limited", ["cost", "loss"])
def test_with_overheads_no_choice_is_better_in_both_loss_and_overhead(limited):
    """Under a limit on the cost; under one on the loss it is the least cost with overheads, to half a percent."""
    rng = np.random.default_rng(1)
    cheaper = 0
    for _ in range(40):
        units = [
            replace(random_candidates(rng, 4), overheads=np.array([*rng.choice([0.0, 30.0], 3), 0.0]))
            for _ in range(rng.integers(2, 5))
        ]
        totals = np.array(
            [
                [sum(getattr(u, name)[i] for u, i in zip(units, pick, strict=True)) for name in ("costs", "losses", "overheads")]
                for pick in itertools.product(*(range(len(unit.costs)) for unit in units))
            ]
        )
        limit = rng.uniform(0.4, 0.9) * sum((unit.costs if limited == "cost" else unit.losses).max() for unit in units)
        within = totals[totals[:, 0 if limited == "cost" else 1] <= limit]
        if not len(within):
            continue
        counted = allocate_by_loss([(Alternative((unit,)),) for unit in units], limit, limited=limited)
        plain = allocate_by_loss([(Alternative((replace(unit, overheads=None),)),) for unit in units], limit, limited=limited)
        cost, loss, overhead = (
            [
                sum(getattr(unit, name)[options[0]] for unit, (_, options) in zip(units, allocation.picks, strict=True))
                for allocation in (counted, plain)
            ]
            for name in ("costs", "losses", "overheads")
        )
        assert (cost if limited == "cost" else loss)[0] <= limit * (1 + 1e-9)
        if limited == "loss":
            assert counted.objective == pytest.approx(cost[0] + overhead[0])
            assert counted.objective <= 1.005 * (within[:, 0] + within[:, 2]).min()
        else:
            assert not ((within[:, 1] < 0.995 * loss[0]) & (within[:, 2] <= overhead[0])).any()
        assert overhead[0] <= overhead[1] or cost[0] < cost[1] or loss[0] < loss[1]
        cheaper += overhead[0] < overhead[1]
    assert cheaper > 5


def test_concave_costs_are_no_trap():
    """A greedy that pays for one direction at a time stops where the pivoted layout's next directions are almost free."""
    rules = Rules(tuple(layouts_named(["dense", "pivoted"])))
    one = candidates(unit_of(64, 64), rules, np.linspace(1, 0, 65))
    groups = [(Alternative((one,)),), (Alternative((one,)),)]
    limit = 1.25 * one.costs[-1]
    allocation = allocate_by_loss(groups, limit, limited="cost")
    assert allocation.objective == pytest.approx(brute_force(groups, limit, "cost"))
    ranks = sorted(one.ranks[options[0]] for _, options in allocation.picks)
    assert ranks[1] == 64
    assert ranks[0] < 16, "one dense and one small beats two of the middle"
