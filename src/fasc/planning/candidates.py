"""What may become of a unit: every rank and layout that is allowed, with its cost and, where it is known, its loss."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fasc.layouts.accounting import ORDER_BYTES, Layout, order_entries, stored_parameters
from fasc.planning.plan import ChannelCut, UnitPlan
from fasc.statistics.moments import Scope
from fasc.model.groups import InputGroup
from fasc.model.layers import Layer

Cost = Literal["rank", "parameters", "bytes"]

Floats = NDArray[np.float64]

_COARSEST = 16
"""A multiple is used where it divides the whole at least so often."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a plan may do."""

    layouts: frozenset[Layout]
    rank_multiple: int = 1
    channel_multiple: int | None = None
    """Of the numbers of channels, if not that of the ranks."""

    floor: float = 0.0
    """Least share of its dense parameters that any unit keeps."""

    overhead: float = 0.0
    """What one product more in a forward pass counts, in parameters."""

    cost: Cost = "parameters"
    bytes_per_parameter: int = 4

    def allows(self, scope: Scope, only: Scope | None) -> bool:
        """Whether units of a scope may be used; ``only`` is the method's one scope, if it has one.

        ``factors`` asks for separate layers and ``shared`` for a projector of the group; neither leaves the choice open.
        """
        if only is not None:
            return scope == only
        named: dict[Scope, bool] = {"layer": "factors" in self.layouts, "group": "shared" in self.layouts}
        return named[scope] or not any(named.values())


@dataclass(frozen=True, slots=True)
class Candidates:
    """The options of one unit, in order of cost."""

    unit: UnitPlan
    """With no rank and no layout yet."""

    ranks: NDArray[np.int64]
    layouts: tuple[Layout, ...]
    costs: Floats
    losses: Floats | None
    """½J in nats per token of each option."""

    whole: float
    """Cost of the dense unit, whether that is an option or not."""

    overheads: Floats | None = None
    """What each option counts beyond its cost when options are compared: for the products that it adds to a forward pass."""

    def pick(self, index: int) -> UnitPlan:
        """The unit as the option says."""
        loss = None if self.losses is None else float(self.losses[index])
        return replace(self.unit, rank=int(self.ranks[index]), layout=self.layouts[index], predicted_loss=loss)


@dataclass(frozen=True, slots=True)
class Way:
    """One way to store the layers of a group, or of groups that stand together: one option is taken of each unit."""

    units: tuple[Candidates, ...]
    cut: ChannelCut | None = None
    """Channels removed first; its loss is part of the way's."""

    @property
    def loss(self) -> float:
        """What the way loses whichever options are taken."""
        return 0.0 if self.cut is None or self.cut.predicted_loss is None else self.cut.predicted_loss


Choice = tuple[Way, ...]
"""The ways of a group, of which one is taken; the method's own scope first."""


def unit_of(group: InputGroup, layers: Sequence[Layer]) -> UnitPlan:
    """The unit of some layers of a group, dense."""
    d_outs = tuple(layer.d_out for layer in layers)
    return UnitPlan(
        unit=layers[0].name if len(layers) == 1 else group.name,
        group=group.name,
        layers=tuple(layer.name for layer in layers),
        d_in=group.d_in,
        d_outs=d_outs,
        rank=min(group.d_in, sum(d_outs)),
        layout="dense",
        dense_biases=sum(layer.d_out for layer in layers if layer.bias),
    )


def step_of(multiple: int, whole: int) -> int:
    """Between the ranks, or the numbers of channels, that a plan may choose: the multiple, or 1 where the whole is small."""
    return multiple if whole >= _COARSEST * multiple else 1


def candidates(unit: UnitPlan, rules: Rules, losses: Floats | None = None, *, uncut: int | None = None) -> Candidates:
    """Every rank that the rules allow, each in its cheapest layout, and the dense layer where that is allowed.

    A rank at which no allowed layout is below the dense size is left out, or ``merged`` where the rules name that layout.

    Args:
        unit: the layers.
        rules: what is allowed.
        losses: ½J at each rank from 0 to the unit's number of directions.
        uncut: parameters that the layers had before they lost channels, of which the floor is a share.
    """
    dense = stored_parameters("dense", 0, unit.d_in, unit.d_out, dense_biases=unit.dense_biases)
    step = step_of(rules.rank_multiple, unit.full_rank)
    least = rules.floor * (uncut or dense)
    found = []
    for rank in range(step, min(unit.d_in, unit.d_out), step):
        layout, parameters = _cheapest(unit, rank, rules)
        if layout is not None and parameters >= least:
            loss = 0.0 if losses is None else float(losses[min(rank, len(losses) - 1)])
            found.append((rank, layout, _cost(unit, rank, layout, rules), loss))
    if "dense" in rules.layouts or not found:
        found.append((unit.rank, "dense", _cost(unit, unit.full_rank, "dense", rules), 0.0))
    found.sort(key=lambda option: (option[2], -option[0]))
    ranks, layouts, costs, known = zip(*found, strict=True)
    return Candidates(
        unit,
        np.array(ranks),
        layouts,
        np.array(costs, dtype=np.float64),
        None if losses is None else np.array(known, dtype=np.float64),
        whole=_cost(unit, unit.full_rank, "dense", rules),
        overheads=np.array([_overhead(layout, rules) for layout in layouts]) if rules.overhead else None,
    )


def _cheapest(unit: UnitPlan, rank: int, rules: Rules) -> tuple[Layout | None, int]:
    factored: Layout = "factors" if len(unit.layers) == 1 else "shared"
    named = {"factors", "shared"} & rules.layouts
    allowed: list[Layout] = [factored] if named else []
    # Of equal costs the first is taken: columns, because they need no rearrangement of the outputs (docs/decisions/0005).
    pivoted: tuple[Layout, ...] = ("pivoted-columns", "pivoted")
    allowed += [layout for layout in pivoted if layout in rules.layouts]
    dense = stored_parameters("dense", 0, unit.d_in, unit.d_out, dense_biases=unit.dense_biases)
    sizes = {layout: stored_parameters(layout, rank, unit.d_in, unit.d_out, dense_biases=unit.dense_biases) for layout in allowed}
    best = min(sizes, key=lambda layout: sizes[layout], default=None)
    if best is not None and sizes[best] < dense:
        return best, sizes[best]
    if "merged" in rules.layouts:
        return "merged", stored_parameters("merged", rank, unit.d_in, unit.d_out, dense_biases=unit.dense_biases)
    return None, 0


def _overhead(layout: Layout, rules: Rules) -> float:
    """Of the one product more that a factored unit needs, however many layers share its projection."""
    if layout in ("dense", "merged") or rules.cost == "rank":
        return 0.0
    return rules.overhead * (rules.bytes_per_parameter if rules.cost == "bytes" else 1)


def _cost(unit: UnitPlan, rank: int, layout: Layout, rules: Rules) -> float:
    if rules.cost == "rank":
        return rank
    parameters = stored_parameters(layout, rank, unit.d_in, unit.d_out, dense_biases=unit.dense_biases)
    if rules.cost == "parameters":
        return parameters
    entries = order_entries(layout, unit.d_in, unit.d_out)
    return (parameters - entries) * rules.bytes_per_parameter + entries * ORDER_BYTES
