"""What may become of a unit: every rank and layout that is allowed, with its cost and, where it is known, its loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from fasc.edits import Edit
from fasc.edits.factor import Factor
from fasc.layouts import Layout
from fasc.methods import Solver
from fasc.model.groups import Scope, Unit

Cost = Literal["rank", "parameters", "bytes"]

Floats = NDArray[np.float64]

_COARSEST = 16
"""A multiple is used where it divides the whole at least so often."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a plan may do."""

    layouts: tuple[Layout, ...]
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
        """Whether units of a scope may be used; ``only`` is the method's one scope, if it has one."""
        if only is not None:
            return scope == only
        asked = {layout.asks_for for layout in self.layouts} - {None}
        return scope in asked or not asked


@dataclass(frozen=True, slots=True)
class Candidates:
    """The options of one unit, in order of cost."""

    unit: Unit
    ranks: NDArray[np.int64]
    layouts: tuple[Layout, ...]
    costs: Floats
    losses: Floats | None
    """π · ½J in nats per token of text, of each option."""

    whole: float
    """Cost of the dense unit, whether that is an option or not."""

    overheads: Floats | None = None
    """What each option counts beyond its cost when options are compared: for the products that it adds to a forward pass."""

    def edit(self, index: int, chosen: Solver) -> Factor | None:
        """The edit of an option; ``None`` where it leaves the unit dense."""
        layout = self.layouts[index]
        if layout.leaves_dense:
            return None
        loss = None if self.losses is None else float(self.losses[index])
        return Factor.of(self.unit, int(self.ranks[index]), layout, chosen, loss)


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to store the layers of a group, or of groups that stand together: one option is taken of each unit."""

    units: tuple[Candidates, ...]
    before: Edit | None = None
    """Made first; the units are what is left. Its loss is part of the alternative's."""

    @property
    def loss(self) -> float:
        """What the alternative loses whichever options are taken."""
        return 0.0 if self.before is None or self.before.predicted_loss is None else self.before.predicted_loss


def step_of(multiple: int, whole: int) -> int:
    """Between the ranks, or the numbers of channels, that a plan may choose: the multiple, or 1 where the whole is small."""
    return multiple if whole >= _COARSEST * multiple else 1


def candidates(unit: Unit, rules: Rules, losses: Floats | None = None, *, dense_parameters: int | None = None) -> Candidates:
    """Every rank that the rules allow, each in its cheapest layout, and the dense layers where that is allowed.

    A rank at which no allowed layout is below the dense size is left out, or kept in a layout of last resort.

    Args:
        unit: the layers.
        rules: what is allowed.
        losses: the forecast at each rank from 0 to the unit's number of directions.
        dense_parameters: what the layers had before they lost channels, of which the floor is a share.
    """
    step = step_of(rules.rank_multiple, unit.full_rank)
    least = rules.floor * (dense_parameters or unit.parameters)
    factored = _suited([layout for layout in rules.layouts if not layout.leaves_dense], unit)
    dense = [layout for layout in rules.layouts if layout.leaves_dense]
    allowed = [(layout, layout.ranks(unit, step)) for layout in factored]
    options = []
    for rank in sorted({rank for _, ranks in allowed for rank in ranks}):
        layout = _cheapest([layout for layout, ranks in allowed if rank in ranks], unit, rank)
        if layout is not None and layout.parameters(unit, rank) >= least:
            options.append((rank, layout))
    if dense or not options:
        options.append((min(unit.d_in, unit.d_out), dense[0] if dense else _leaving_dense()))
    rows = [(_cost(layout, unit, rank, rules), -rank, position) for position, (rank, layout) in enumerate(options)]
    ordered = [options[position] for _, _, position in sorted(rows)]
    known = None
    if losses is not None:
        known = np.array([0.0 if layout.leaves_dense else losses[min(rank, len(losses) - 1)] for rank, layout in ordered])
    return Candidates(
        unit,
        np.array([rank for rank, _ in ordered]),
        tuple(layout for _, layout in ordered),
        np.array([_cost(layout, unit, rank, rules) for rank, layout in ordered], dtype=np.float64),
        known,
        whole=_cost(_leaving_dense(), unit, unit.full_rank, rules),
        overheads=np.array([_overhead(layout, rules) for _, layout in ordered]) if rules.overhead else None,
    )


def _leaving_dense() -> Layout:
    from fasc.layouts import LAYOUTS  # noqa: PLC0415 - looked up late: the registry fills itself

    return next(layout for layout in LAYOUTS.values() if layout.leaves_dense)


def _suited(layouts: Sequence[Layout], unit: Unit) -> list[Layout]:
    """The forms for this unit, each once; cheaper to run first, so that it is taken where two are as large."""
    forms = {id(form): form for form in (layout.suited(unit) for layout in layouts)}
    return sorted(forms.values(), key=lambda form: (form.extra_products, form.extra_copies))


def _cheapest(layouts: Sequence[Layout], unit: Unit, rank: int) -> Layout | None:
    """The smallest layout below the dense size, or one of last resort."""
    below = [layout for layout in layouts if layout.parameters(unit, rank) < unit.parameters and not layout.last_resort]
    if below:
        return min(below, key=lambda layout: layout.parameters(unit, rank))
    return next((layout for layout in layouts if layout.last_resort), None)


def _overhead(layout: Layout, rules: Rules) -> float:
    """Of the products that a layout adds, however many layers share a projection."""
    if rules.cost == "rank":
        return 0.0
    return layout.extra_products * rules.overhead * (rules.bytes_per_parameter if rules.cost == "bytes" else 1)


def _cost(layout: Layout, unit: Unit, rank: int, rules: Rules) -> float:
    if rules.cost == "rank":
        return unit.full_rank if layout.leaves_dense else rank
    if rules.cost == "parameters":
        return layout.parameters(unit, rank)
    return layout.bytes(unit, rank, rules.bytes_per_parameter)
