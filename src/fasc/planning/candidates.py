"""What may become of a unit: every rank and layout that is allowed, with its cost and, where it is known, its loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fasc.edits import Edit
from fasc.edits.factor import Factor
from fasc.edits.quantise import Quantise
from fasc.forecast.rounding import rounding_share
from fasc.layouts import Layout
from fasc.layouts.quantised import quantised_bytes
from fasc.methods import Solver
from fasc.model.groups import Scope, Unit

Cost = Literal["rank", "parameters", "bytes", "multiply-adds"]

Floats = NDArray[np.float64]

Curves = Mapping[str, Floats]
"""Forecasts by unit, and those of what may be left out."""

_COARSEST = 16
"""A multiple is used where it divides the whole at least so often."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a plan may do."""

    layouts: tuple[Layout, ...]
    rank_multiple: int = 1
    channel_multiple: int | None = None
    """Of the numbers of channels, if not that of the ranks."""

    equal_experts: bool = False
    """Whether all experts of a block keep as many channels as each other."""

    floor: float = 0.0
    """Least share of its dense parameters that any unit keeps."""

    overhead: float = 0.0
    """What one product more in a forward pass counts, in parameters."""

    cost: Cost = "parameters"
    bytes_per_parameter: int = 4

    bits: tuple[int, ...] = ()
    """Of the weights, where they are rounded; 16 leaves them as they are. Empty: nothing is rounded."""

    bits_group: int = 64
    """Inputs that share a scale."""

    counts_multiply_adds: bool = False
    """Whether multiply-adds are limited beside the cost."""

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

    bits: NDArray[np.int64] | None = None
    """Of the weights in each option; 0 leaves them as they are."""

    roundings: Floats | None = None
    """The part of the losses that is due to rounding."""

    bits_group: int = 64

    multiply_adds: Floats | None = None
    """Of each option, per token of the text, where they are limited beside the cost."""

    def edits(self, index: int, chosen: Solver) -> list[Edit]:
        """The edits of an option; none where it leaves the unit as it is."""
        layout, rank = self.layouts[index], int(self.ranks[index])
        loss = None if self.losses is None else float(self.losses[index])
        rounding = None if loss is None or self.roundings is None else float(self.roundings[index])
        edits: list[Edit] = []
        if not layout.leaves_dense:
            edits.append(Factor.of(self.unit, rank, layout, chosen, None if loss is None else loss - (rounding or 0.0)))
        bits = 0 if self.bits is None else int(self.bits[index])
        if bits:
            names = tuple(layer.name for layer in self.unit.layers)
            maps = tuple(layout.maps(self.unit, rank))
            edits.append(
                Quantise(
                    group=self.unit.group,
                    layers=names,
                    maps=maps,
                    bits=bits,
                    group_size=self.bits_group,
                    predicted_loss=rounding,
                )
            )
        return edits


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to store the layers of a group, or of groups that stand together: one option is taken of each unit."""

    units: tuple[Candidates, ...]
    before: tuple[Edit, ...] = ()
    """Made first; the units are what is left. Their loss is part of the alternative's."""

    cost: float = 0.0
    """Beside that of the units."""

    @property
    def loss(self) -> float:
        """What the alternative loses whichever options are taken."""
        return sum(edit.predicted_loss or 0.0 for edit in self.before)


def step_of(multiple: int, whole: int) -> int:
    """Between the ranks, or the numbers of channels, that a plan may choose: the multiple, or 1 where the whole is small."""
    return multiple if whole >= _COARSEST * multiple else 1


def candidates(
    unit: Unit,
    rules: Rules,
    losses: Floats | None = None,
    *,
    dense_parameters: int | None = None,
    noise: Mapping[str, Floats] | None = None,
) -> Candidates:
    """Every rank that the rules allow, each in its cheapest layout, and the dense layers where that is allowed.

    A rank at which no allowed layout is below the dense size is left out, or kept in a layout of last resort. Where weights are
    rounded, each rank is offered in every layout below the dense size, because some layouts bear few bits better than others.

    Args:
        unit: the layers.
        rules: what is allowed.
        losses: the forecast at each rank from 0 to the unit's number of directions.
        dense_parameters: what the layers had before they lost channels, of which the floor is a share.
        noise: by layout, the forecast of rounding to one step at each rank, or the one number of the dense layers; see
            :func:`~fasc.forecast.rounding.noise_loss`.
    """
    table = _table(_anonymous(unit), rules, rules.floor * (dense_parameters or unit.parameters))
    known = roundings = None
    if losses is not None:
        known = np.array([0.0 if one.leaves_dense else losses[min(rank, len(losses) - 1)] for rank, one in table.stored])[
            table.place
        ]
    if known is not None and rules.bits:
        noises = np.array([_noise_at(layout, rank, noise or {}) for rank, layout in table.stored])
        roundings = noises[table.place] * _SHARES[table.bits]
        known = known + roundings
    kept = np.arange(len(table.place))
    if known is not None and rules.bits and not rules.counts_multiply_adds:
        kept = _undominated(known, np.array([_overhead(one, rules) for _, one in table.stored])[table.place])
    place = table.place[kept]
    layouts = tuple(table.stored[one][1] for one in place)
    return Candidates(
        unit,
        np.array([table.stored[one][0] for one in place]),
        layouts,
        table.costs[kept],
        None if known is None else known[kept],
        whole=_cost(_leaving_dense(), unit, unit.full_rank, rules),
        overheads=np.array([_overhead(layout, rules) for layout in layouts]) if rules.overhead else None,
        bits=table.bits[kept] if rules.bits else None,
        roundings=None if roundings is None else roundings[kept],
        bits_group=rules.bits_group,
        multiply_adds=table.multiply_adds[place] if rules.counts_multiply_adds else None,
    )


def _undominated(losses: Floats, overheads: Floats) -> NDArray[np.int64]:
    """Options, in order of cost, that lose less than every cheaper one of the same overhead."""
    kept = np.zeros(len(losses), dtype=bool)
    for overhead in np.unique(overheads):
        alike = np.flatnonzero(overheads == overhead)
        before = np.minimum.accumulate(np.append(np.inf, losses[alike][:-1]))
        kept[alike[losses[alike] < before]] = True
    return np.flatnonzero(kept)


class _Table(NamedTuple):
    """What units of one shape may become, whatever they lose; in order of cost."""

    stored: list[tuple[int, Layout]]
    """Ranks in layouts."""

    multiply_adds: Floats
    """Of each of these."""

    place: NDArray[np.int64]
    """Of each option in ``stored``."""

    bits: NDArray[np.int64]
    costs: Floats


def _anonymous(unit: Unit) -> Unit:
    """The shape alone: blocks of a model have the same."""
    return Unit("", tuple(replace(layer, name="") for layer in unit.layers))


@lru_cache(maxsize=4096)
def _table(unit: Unit, rules: Rules, least: float) -> _Table:
    stored = _options(unit, rules, least)
    menu = np.array([0 if bits == UNROUNDED else bits for bits in rules.bits] or [0])
    bits = np.tile(menu, len(stored))
    place = np.repeat(np.arange(len(stored)), len(menu))
    costs = np.array([_cost(layout, unit, rank, rules) for rank, layout in stored], dtype=np.float64)[place]
    if rules.bits and rules.cost == "bytes":
        costs -= _saved_by_rounding(unit, stored, menu, rules).ravel()
    ranks = np.array([rank for rank, _ in stored])[place]
    order = np.lexsort((np.arange(len(place)), -ranks, costs))
    multiply_adds = np.array([layout.multiply_adds(unit, rank) for rank, layout in stored], dtype=np.float64)
    return _Table(stored, multiply_adds, place[order], bits[order], costs[order])


def _options(unit: Unit, rules: Rules, least: float) -> list[tuple[int, Layout]]:
    """Ranks with their layouts, and the dense layers."""
    step = step_of(rules.rank_multiple, unit.full_rank)
    factored = _suited([layout for layout in rules.layouts if not layout.leaves_dense], unit)
    dense = [layout for layout in rules.layouts if layout.leaves_dense]
    allowed = [(layout, layout.ranks(unit, step)) for layout in factored]
    options = []
    for rank in sorted({rank for _, ranks in allowed for rank in ranks}):
        for layout in _at_rank([layout for layout, ranks in allowed if rank in ranks], unit, rank, several=bool(rules.bits)):
            if layout.parameters(unit, rank) >= least:
                options.append((rank, layout))
    if dense or not options:
        options.append((min(unit.d_in, unit.d_out), dense[0] if dense else _leaving_dense()))
    return options


UNROUNDED = 16
"""In a menu of bits: the weights stay as they are, in the precision of the model."""


_SHARES = np.array([rounding_share(bits) for bits in range(9)])
"""By bits."""


def _saved_by_rounding(unit: Unit, options: Sequence[tuple[int, Layout]], menu: NDArray[np.int64], rules: Rules) -> Floats:
    """Bytes that each option saves in each number of bits, [options, bits]."""
    saved = np.zeros((len(options), len(menu)))
    for row, (rank, layout) in enumerate(options):
        for d_in, d_out in layout.maps(unit, rank):
            after = quantised_bytes(d_in, d_out, menu, rules.bits_group) + rules.bytes_per_parameter
            saved[row] += np.where(menu > 0, d_in * d_out * rules.bytes_per_parameter - after, 0)
    return saved


def _noise_at(layout: Layout, rank: int, noise: Mapping[str, Floats]) -> float:
    """Without a forecast the option is never rounded."""
    curve = noise.get(layout.name)
    return 1e300 if curve is None else float(curve[min(rank, len(curve) - 1)])


def _leaving_dense() -> Layout:
    from fasc.layouts import LAYOUTS  # noqa: PLC0415 - looked up late: the registry fills itself

    return next(layout for layout in LAYOUTS.values() if layout.leaves_dense)


def _suited(layouts: Sequence[Layout], unit: Unit) -> list[Layout]:
    """The forms for this unit, each once; cheaper to run first, so that it is taken where two are as large."""
    forms = {id(form): form for form in (layout.suited(unit) for layout in layouts)}
    return sorted(forms.values(), key=lambda form: (form.extra_products, form.extra_copies))


def _at_rank(layouts: Sequence[Layout], unit: Unit, rank: int, *, several: bool) -> list[Layout]:
    """The cheapest layout, or every one below the dense size."""
    cheapest = _cheapest(layouts, unit, rank)
    if cheapest is None or cheapest.last_resort or not several:
        return [] if cheapest is None else [cheapest]
    return [one for one in layouts if not one.last_resort and one.parameters(unit, rank) < unit.parameters]


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
    if rules.cost == "multiply-adds":
        return layout.multiply_adds(unit, rank)
    return layout.bytes(unit, rank, rules.bytes_per_parameter)
