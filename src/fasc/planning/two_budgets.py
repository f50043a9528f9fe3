"""Two budgets together: bytes (or parameters) and multiply-adds, one price for each.

At a price μ of a multiply-add the loss of every option grows by μ times its own, and the allocation under the other limit is the
usual one. The more they cost, the fewer are used; the least price at which they keep their limit is found by bisection.
"""

from collections.abc import Sequence
from dataclasses import replace

from fasc.errors import BudgetError
from fasc.planning.candidates import Alternative, Candidates
from fasc.planning.lagrangian import Allocation, Picks, allocate_by_loss

_BISECTIONS = 40

Choices = Sequence[Sequence[Alternative]]


def allocate_within_both(choices: Choices, limit: float, multiply_adds: float) -> Allocation:
    """The least loss within a limit of the cost and one of the multiply-adds.

    Args:
        choices: the alternatives of each group, their units with multiply-adds.
        limit: most cost.
        multiply_adds: most of them, per token of all layers.

    Raises:
        BudgetError: no choice keeps both; gives the least that is possible.
    """
    free = allocate_by_loss(choices, limit, limited="cost")
    if _used(choices, free.picks) <= multiply_adds:
        return free
    scale = max(_loss(choices, free.picks), 1e-12) / max(_used(choices, free.picks), 1.0)
    low, high, best = 0.0, scale, None
    while best is None:
        made = allocate_by_loss(_priced(choices, high), limit, limited="cost")
        if _used(choices, made.picks) <= multiply_adds:
            best = made.picks
        elif high > 1e15 * scale:
            fewest = _used(choices, made.picks)
            raise BudgetError(
                f"no plan within {limit:,.6g} has {multiply_adds:,.0f} multiply-adds: the fewest are {fewest:,.0f}",
                "raise --flop-fraction or the other budget",
            )
        else:
            low, high = high, high * 8
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        made = allocate_by_loss(_priced(choices, price), limit, limited="cost")
        if _used(choices, made.picks) <= multiply_adds:
            high = price
            if _loss(choices, made.picks) < _loss(choices, best):
                best = made.picks
        else:
            low = price
    return Allocation(best, _loss(choices, best), free.lower_bound)


def _priced(choices: Choices, price: float) -> list[list[Alternative]]:
    def priced(unit: Candidates) -> Candidates:
        assert unit.losses is not None and unit.multiply_adds is not None  # noqa: S101 - the planner has seen to it
        return replace(unit, losses=unit.losses + price * unit.multiply_adds)

    return [[replace(one, units=tuple(map(priced, one.units))) for one in group] for group in choices]


def _used(choices: Choices, picks: Picks) -> float:
    total = 0.0
    for group, (which, options) in zip(choices, picks, strict=True):
        for unit, option in zip(group[which].units, options, strict=True):
            total += 0.0 if unit.multiply_adds is None else float(unit.multiply_adds[option])
    return total


def _loss(choices: Choices, picks: Picks) -> float:
    total = 0.0
    for group, (which, options) in zip(choices, picks, strict=True):
        total += group[which].loss
        for unit, option in zip(group[which].units, options, strict=True):
            total += 0.0 if unit.losses is None else float(unit.losses[option])
    return total
