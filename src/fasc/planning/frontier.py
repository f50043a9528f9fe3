"""The frontier: for each number of bytes, what width alone, bits alone and both together are forecast to lose."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fasc.errors import BudgetError
from fasc.planning.options import BudgetConfig, MethodConfig
from fasc.planning.plan import Plan

WAYS = ("width", "bits", "both")
"""Fewer weights in the precision of the model; all weights in fewer bits; either, together."""

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2, 0.15, 0.1)
"""Of the dense bytes."""

MENU = (3, 4, 5, 6, 8)
"""Bits a weight may have, where nothing else is said."""

_ALIKE = 1.02
"""Forecasts that differ by less are as good as each other."""

Make = Callable[[MethodConfig, BudgetConfig], Plan]


@dataclass(frozen=True)
class Point:
    """One budget."""

    bytes: int
    plans: dict[str, Plan]
    """By way; those that can keep the budget."""

    def loss(self, way: str) -> float | None:
        """Forecast in nats per token."""
        return self.plans[way].predicted_loss if way in self.plans else None

    @property
    def better_buy(self) -> str:
        """``bits``, ``width`` or ``both``: the simplest way that loses no more than the best."""
        losses = {way: loss for way in ("bits", "width", "both") if (loss := self.loss(way)) is not None}
        best = min(losses.values())
        return next(way for way, loss in losses.items() if loss <= _ALIKE * best)

    def sentence(self) -> str:
        """The better buy in words."""
        if self.better_buy == "bits":
            return "bits: every weight stays"
        if self.better_buy == "width":
            return "fewer weights, unrounded"
        bits, both = self.loss("bits"), self.loss("both") or 0.0
        less = "" if bits is None or not both else f", {bits / both:.2f} × less loss than bits alone"
        return f"fewer weights in more bits each{less}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        totals = {way: plan.totals for way, plan in self.plans.items()}
        return {"bytes": self.bytes, "better_buy": self.better_buy, "totals": totals}


def frontier(make: Make, options: MethodConfig, dense_bytes: int, shares: Sequence[float] = SHARES) -> list[Point]:
    """A point for each share of the dense bytes that some plan can keep.

    Args:
        make: a plan from options and a budget.
        options: with the menu of bits.
        dense_bytes: of the model.
        shares: of these.

    Raises:
        BudgetError: there is no menu of bits, or no budget can be kept.
    """
    if not options.bits:
        raise BudgetError("a frontier weighs width against bits, and there are no bits to choose from", "give --bits 3,4,5,6,8")
    ways = {"width": options.but(bits=None, bits_vocabulary=False), "bits": options.but(layouts=("dense",)), "both": options}
    points = []
    for share in shares:
        budget, plans = BudgetConfig(max_bytes=int(share * dense_bytes), overhead=0), {}
        for way in WAYS:
            try:
                plans[way] = make(ways[way], budget)
            except BudgetError:  # too little for this way
                continue
        if plans:
            points.append(Point(int(share * dense_bytes), plans))
    if not points:
        raise BudgetError("no plan keeps any budget of the frontier", "what is never compressed is most of this model")
    return points


def verdict(points: Sequence[Point]) -> str:
    """Where bits stop being the better buy, in a sentence."""
    rounded = [point for point in points if point.better_buy == "bits"]
    joint = [point for point in points if point.better_buy == "both"]
    if not joint:
        return f"Bits alone are the better buy at each of these sizes, down to {points[-1].bytes / 1e6:,.1f} MB."
    if not rounded:
        return "Fewer weights in more bits each are the better buy at each of these sizes."
    return (
        f"Bits alone are the better buy down to {rounded[-1].bytes / 1e6:,.1f} MB; "
        f"from {joint[0].bytes / 1e6:,.1f} MB on, fewer weights in more bits each."
    )
