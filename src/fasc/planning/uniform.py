"""The uniform allocation: the same share of every unit."""

from collections.abc import Sequence

import numpy as np

from fasc.errors import BudgetError
from fasc.planning.candidates import Candidates


def allocate_uniformly(units: Sequence[Candidates], share: float) -> list[int]:
    """Give every unit the largest option within ``share`` of its whole cost, then spend what rounding left over.

    Ranks are multiples, so each unit falls a little short. What is left goes, one step each, to the units that fell shortest,
    so that the total is met as closely as a step allows and never exceeded.

    Args:
        units: their options in order of cost; one with a single option gets that, whatever it costs.
        share: of the cost of each other dense unit, in (0, 1].

    Returns:
        The index of each unit's option.

    Raises:
        BudgetError: some unit has no option so small.
    """
    picks = []
    for unit in units:
        if len(unit.costs) == 1:  # a layer of one row has no rank between nothing and all
            picks.append(0)
            continue
        target = share * unit.whole
        index = int(np.searchsorted(unit.costs, target * (1 + 1e-9), side="right")) - 1
        if index < 0:
            least = max(float(one.costs[0] / one.whole) for one in units if len(one.costs) > 1)
            raise BudgetError(
                f"a fraction of {share:g} leaves no direction of `{unit.unit.name}` ({unit.unit.d_out}×{unit.unit.d_in})",
                f"the least for a uniform allocation is {np.ceil(1e4 * least) / 1e4:g}",
            )
        picks.append(index)
    free = [(unit, pick) for unit, pick in zip(units, picks, strict=True) if len(unit.costs) > 1]
    slack = sum(share * unit.whole - unit.costs[pick] for unit, pick in free) + 1e-6
    shortfall = [share - unit.costs[pick] / unit.whole for unit, pick in zip(units, picks, strict=True)]
    for which in sorted(range(len(units)), key=lambda position: -shortfall[position]):
        costs = units[which].costs
        if picks[which] + 1 < len(costs):
            step = float(costs[picks[which] + 1] - costs[picks[which]])
            if step <= slack:
                slack -= step
                picks[which] += 1
    return picks


def uniform_share_for_loss(units: Sequence[Candidates], most: float) -> float:
    """The smallest share whose uniform allocation stays within a loss of ``most`` nats per token, by bisection.

    Args:
        units: with their losses.
        most: Σ ½J allowed.
    """
    least = max((float(unit.costs[0] / unit.whole) for unit in units if len(unit.costs) > 1), default=1.0)
    low, high = least, 1.0

    def loss(share: float) -> float:
        picks = allocate_uniformly(units, share)
        return sum(float(unit.losses[pick]) for unit, pick in zip(units, picks, strict=True) if unit.losses is not None)

    if loss(low) <= most:
        return low
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if loss(middle) <= most else (middle, high)
    return high
