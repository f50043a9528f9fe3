"""The global allocation: the least predicted loss that a budget buys, or the least budget that keeps a loss.

Each unit offers options (a rank in a layout) with a cost and a loss. A group has alternatives (one projector for its layers, or
each layer by itself; for an MLP also with fewer channels), and an alternative takes one option of each of its units. This is a
multiple-choice knapsack. Costs of the pivoted layout are concave in the rank, so a greedy that assumes a constant price per
direction is wrong; instead the problem is relaxed with one price λ for the whole budget, which splits it into an exact minimum
per unit, and λ is found by bisection. The relaxation also bounds the optimum from below. Options that this bound excludes are
dropped, and what is left is solved exactly, group by group, over all undominated totals.

An option may have an overhead: what it counts beyond its cost when options are compared, for the time of the products that it
adds to a forward pass. It uses nothing of a limit on the cost; it is paid at the price λ that a parameter has without overheads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasc.errors import BudgetError
from fasc.planning.candidates import Alternative, Candidates, Floats

_BISECTIONS = 100
_GAP = 1e-4
"""Relative distance from the lower bound at which the search stops."""

_STATES = 2_000
"""Undominated totals kept at most; beyond it those with the best bound are kept, and the result may be above the optimum by at
most its distance from the lower bound."""

_PER_GROUP = 200
"""Undominated choices within one group that are looked at, at most; likewise."""


class _Options(NamedTuple):
    """One unit: what is minimised and what is limited, for each option."""

    objective: Floats
    limited: Floats
    overhead: Floats
    """In the unit of the costs, wherever they stand."""


@dataclass(frozen=True, slots=True)
class _Alternative:
    """One alternative of a group: the options of each unit, and what the alternative itself adds."""

    units: tuple[_Options, ...]
    objective: float
    limited: float


_Choice = tuple[_Alternative, ...]

Picks = list[tuple[int, list[int]]]
"""Per group: the index of the alternative, and of the option of each of its units."""


@dataclass(frozen=True, slots=True)
class Allocation:
    """A choice for every group, and how good it is."""

    picks: Picks
    objective: float
    """Loss, or cost, of the choice, overheads included."""

    lower_bound: float
    """No allocation within the limit is better than this."""


def allocate_by_loss(groups: Sequence[Sequence[Alternative]], limit: float, *, limited: str) -> Allocation:
    """The best choice within a limit.

    Args:
        groups: the alternatives of each, with losses in one unit, nats per token.
        limit: most cost if ``limited`` is ``cost``, most loss if it is ``loss``.
        limited: which of the two has the limit; the other is minimised.

    Raises:
        BudgetError: even the smallest options exceed the limit.
    """
    swap = limited == "loss"
    choices = [tuple(_alternative(one, swap=swap) for one in group) for group in groups]
    least = sum(_least(choice) for choice in choices)
    if least > limit * (1 + 1e-12):
        raise BudgetError(
            f"the budget is {limit:,.6g} and the smallest possible plan needs {least:,.6g}",
            "ask for more, or allow more layouts (--layouts) and no --floor",
        )
    relaxed = _relaxed(choices, limit)
    if any(unit.overhead.any() for choice in choices for alternative in choice for unit in alternative.units):
        choices = [_overheads_paid(choice, 1.0 if swap else relaxed.price) for choice in choices]
        relaxed = _relaxed(choices, limit)
    picks, best = relaxed.picks, relaxed.objective
    if best - relaxed.lower_bound > _GAP * max(abs(best), 1e-300):
        picks = _close_the_gap(choices, limit, relaxed)
        best = _value(choices, picks)
    return Allocation(picks, best, relaxed.lower_bound)


class _Relaxed(NamedTuple):
    """The exact minimum at the price at which the limit is just kept."""

    picks: Picks
    objective: float
    price: float
    lower_bound: float
    """``objective + price · (used − limit)``: of any choice within the limit."""


def _options(unit: Candidates, *, swap: bool) -> _Options:
    assert unit.losses is not None  # noqa: S101 - the planner has checked that every unit has losses
    overhead = np.zeros(len(unit.costs)) if unit.overheads is None else unit.overheads
    return _Options(unit.costs, unit.losses, overhead) if swap else _Options(unit.losses, unit.costs, overhead)


def _alternative(one: Alternative, *, swap: bool) -> _Alternative:
    loss, cost = (one.cost, one.loss) if swap else (one.loss, one.cost)
    return _Alternative(tuple(_options(unit, swap=swap) for unit in one.units), loss, cost)


def _overheads_paid(choice: _Choice, price: float) -> _Choice:
    """The same choice with the overheads, each times the price, in what is minimised."""

    def paid(unit: _Options) -> _Options:
        return unit._replace(objective=unit.objective + price * unit.overhead)

    return tuple(replace(alternative, units=tuple(map(paid, alternative.units))) for alternative in choice)


def _least(choice: _Choice) -> float:
    return min(alternative.limited + sum(float(unit.limited.min()) for unit in alternative.units) for alternative in choice)


def _cheapest_at(choices: Sequence[_Choice], price: float) -> tuple[Picks, float, float]:
    """The exact minimum of objective + price · limited: picks, their objective and their use of the limit."""
    picks: Picks = []
    objective = used = 0.0
    for choice in choices:
        worths: list[tuple[float, float, tuple[int, list[int]]]] = []
        for which, alternative in enumerate(choice):
            options = [int(np.argmin(unit.objective + price * unit.limited)) for unit in alternative.units]
            pick = (which, options)
            worths.append((*_worth(alternative, options), pick))
        cost, use, pick = min(worths, key=lambda one: one[0] + price * one[1])
        picks.append(pick)
        objective += cost
        used += use
    return picks, objective, used


def _worth(alternative: _Alternative, options: Sequence[int]) -> tuple[float, float]:
    """Objective and use of the limit of an alternative with these options."""
    parts = list(zip(alternative.units, options, strict=True))
    return (
        alternative.objective + sum(float(unit.objective[i]) for unit, i in parts),
        alternative.limited + sum(float(unit.limited[i]) for unit, i in parts),
    )


def _bracket(choices: Sequence[_Choice], limit: float) -> tuple[float, float]:
    """Two prices around the one at which the limit is just kept."""
    low, high = 0.0, 1.0
    while _cheapest_at(choices, high)[2] > limit and high < 1e300:
        low, high = high, high * 16
    while low == 0.0 and high > 1e-300 and _cheapest_at(choices, high / 16)[2] <= limit:
        high /= 16
    return low, high


def _relaxed(choices: Sequence[_Choice], limit: float) -> _Relaxed:
    """The least price whose choice keeps the limit, by bisection; nothing is paid where the limit does not bind."""
    picks, objective, used = _cheapest_at(choices, 0.0)
    if used <= limit:
        return _Relaxed(picks, objective, 0.0, objective)
    low, high = _bracket(choices, limit)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if _cheapest_at(choices, middle)[2] <= limit else (middle, high)
    picks, objective, used = _cheapest_at(choices, high)
    return _Relaxed(picks, objective, high, objective + high * (used - limit))


def _value(choices: Sequence[_Choice], picks: Picks) -> float:
    return sum(_worth(choice[which], options)[0] for choice, (which, options) in zip(choices, picks, strict=True))


def _close_the_gap(choices: Sequence[_Choice], limit: float, relaxed: _Relaxed) -> Picks:
    """Exact search among the options that could be part of something better than the relaxed choice.

    Totals are measured from the relaxed minimum: of each group, its objective and its reduced cost
    ``objective + price · limited − minimum``. A partial choice whose reduced costs sum to more than the gap cannot be completed
    to anything better than what is known.
    """
    feasible, price = relaxed.picks, relaxed.price
    gap = relaxed.objective - relaxed.lower_bound
    gap += 1e-9 * abs(gap)
    limited, reduced = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    undominated = [_undominated_of(choice, price, gap) for choice in choices]
    least_left = np.cumsum([0.0, *(min(group.limited) for group in reversed(undominated))])[::-1][1:]
    for group, left in zip(undominated, least_left, strict=True):
        uses = (limited[:, None] + group.limited[None, :]).ravel()
        costs = (reduced[:, None] + group.reduced[None, :]).ravel()
        alive = np.flatnonzero((costs <= gap) & (uses + left <= limit * (1 + 1e-12)))
        kept = alive[_undominated(uses[alive], costs[alive], price, _STATES)]
        trail.append((kept // len(group.limited), kept % len(group.limited)))
        limited, reduced = uses[kept], costs[kept]
        if not len(kept):
            return feasible
    state = int(np.argmin(reduced - price * limited))
    picks: Picks = []
    for (parents, options), group in zip(reversed(trail), reversed(undominated), strict=True):
        picks.append(group.picks[int(options[state])])
        state = int(parents[state])
    picks.reverse()
    return picks if _value(choices, picks) < _value(choices, feasible) else feasible


def _undominated(uses: Floats, costs: Floats, price: float, most: int | None = None) -> NDArray[np.int64]:
    """Indices of totals that no other beats in both the use of the limit and the objective ``costs − price · uses``."""
    objectives = costs - price * uses
    order = np.lexsort((objectives, uses))
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], objectives[order][:-1])))
    kept = order[objectives[order] < best_before]
    return kept if most is None or len(kept) <= most else kept[np.argsort(costs[kept], kind="stable")[:most]]


@dataclass(frozen=True, slots=True)
class _Undominated:
    """The alternatives to choose in one group that the gap leaves: use of the limit, reduced cost, picks."""

    limited: Floats
    reduced: Floats
    picks: Picks


def _undominated_of(choice: _Choice, price: float, gap: float) -> _Undominated:
    priced = [[unit.objective + price * unit.limited for unit in alternative.units] for alternative in choice]
    least = [
        alternative.objective + price * alternative.limited + sum(float(values.min()) for values in units)
        for alternative, units in zip(choice, priced, strict=True)
    ]
    best = min(least)
    slack = gap + 1e-12 * abs(best)
    uses, costs, picks = np.empty(0), np.empty(0), []
    for which, (alternative, units) in enumerate(zip(choice, priced, strict=True)):
        use, cost = np.array([alternative.limited]), np.array([least[which] - best])
        options = np.empty((1, 0), dtype=np.int64)
        for unit, values in zip(alternative.units, units, strict=True):
            totals = (cost[:, None] + (values - values.min())[None, :]).ravel()
            alive = np.flatnonzero(totals <= slack)
            before, last = np.divmod(alive, len(values))
            together = use[before] + unit.limited[last]
            # What is added later is the same for all of an alternative; the experts of a block together have many units.
            kept = _undominated(together, totals[alive], price, _STATES)
            use, cost = together[kept], totals[alive[kept]]
            options = np.concatenate([options[before[kept]], last[kept, None]], axis=1)
        near = cost <= slack
        uses, costs = np.concatenate([uses, use[near]]), np.concatenate([costs, cost[near]])
        picks += [(which, row) for row in options[near].tolist()]
    kept = _undominated(uses, costs, price, _PER_GROUP)
    return _Undominated(uses[kept], costs[kept], [picks[index] for index in kept])
