"""The registry of methods: a name, what it must be given, what it can be told, where it comes from."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from fasc.linalg.decomposition import Decomposition
from fasc.methods.options import MethodOptions
from fasc.model.groups import Scope
from fasc.options import parse
from fasc.registry import Registry
from fasc.statistics.moments import Moment, Need, UnitStatistics

EnergyUnit = Literal["nats²/token", "output²/token", "input²/token", "weight²", "none"]

Decompose = Callable[[Tensor, UnitStatistics, Any], Decomposition]
"""``(weight [d_out, d_in] float64, statistics of the unit, the method's options) → the full decomposition``."""

Energies = Callable[[Tensor, UnitStatistics, Any], Tensor]
"""The same arguments → the energies of that decomposition."""


@dataclass(frozen=True, slots=True)
class AtRank:
    """A decomposition that is good for one rank."""

    decomposition: Decomposition
    whole: bool = True
    """Whether it holds every direction, with its energies; otherwise only the leading ones."""

    notes: Mapping[str, Any] = field(default_factory=dict)
    """How good it is, as plain JSON values, for the plan."""


DecomposeAtRank = Callable[[Tensor, UnitStatistics, Any, int], AtRank]
"""The same arguments and the rank that will be kept → a decomposition for that rank, where one can be had for less."""


@dataclass(frozen=True, slots=True)
class Method:
    """A registered method."""

    name: str
    scopes: tuple[Scope, ...]
    """``group``: one decomposition (one projector) for all layers that read the same tensor, weights stacked by rows.
    ``layer``: one for each layer. The first is what the method is; a global budget may use any of them."""

    moments: frozenset[Moment]
    """What it must be given, of its unit."""

    energy_unit: EnergyUnit
    """Energies in nats² per token are a loss and can be compared across layers; others cannot."""

    surrogate: str
    """What it minimises, as a formula."""

    reference: str
    coordinate_free: bool
    """Whether a rotation of the inputs changes nothing."""

    decompose: Decompose
    options: type[MethodOptions] = MethodOptions
    """What it can be told."""

    energies: Energies | None = None
    """The energies alone, where they can be had without the directions."""

    at_rank: DecomposeAtRank | None = None
    """A decomposition for one rank, where that is cheaper."""

    @property
    def scope(self) -> Scope:
        """The method's own scope."""
        return self.scopes[0]

    @property
    def needs(self) -> frozenset[Need]:
        """The moments it must be given in its own scope."""
        return self.needs_in(self.scopes[:1])

    def needs_in(self, scopes: Iterable[Scope]) -> frozenset[Need]:
        """The moments it must be given to work in these scopes."""
        # These are measured once for the group, whichever way its layers are then decomposed.
        return frozenset(Need(m, "group" if m in _OF_THE_INPUT else scope) for scope in scopes for m in self.moments)

    @property
    def is_loss(self) -> bool:
        """Whether its energies are a loss in nats, comparable across layers."""
        return self.energy_unit == "nats²/token"

    @property
    def summary(self) -> str:
        """First line of the method's docstring."""
        return (self.decompose.__doc__ or "").strip().splitlines()[0]


@dataclass(frozen=True, slots=True)
class Solver:
    """A method with its options."""

    method: Method
    options: MethodOptions

    @property
    def name(self) -> str:
        """The method's."""
        return self.method.name

    @property
    def damping(self) -> float:
        """Relative to the mean eigenvalue."""
        return self.options.damping

    def decompose(self, weight: Tensor, statistics: UnitStatistics) -> Decomposition:
        """The full decomposition of a unit's stacked weight, [d_out, d_in] float64."""
        return self.method.decompose(weight, statistics, self.options)

    def energies(self, weight: Tensor, statistics: UnitStatistics) -> Tensor | None:
        """The energies of :meth:`decompose` alone, if the method can have them without the directions."""
        return None if self.method.energies is None else self.method.energies(weight, statistics, self.options)

    def at_rank(self, weight: Tensor, statistics: UnitStatistics, rank: int) -> AtRank:
        """A decomposition to be truncated at this rank."""
        if self.method.at_rank is None:
            return AtRank(self.decompose(weight, statistics))
        return self.method.at_rank(weight, statistics, self.options, rank)


_OF_THE_INPUT: frozenset[Moment] = frozenset({"input", "magnitude", "output_scale", "product", "rows", "sequences", "taylor"})

METHODS: Registry[Method] = Registry("method", "fasc.methods")
"""Every registered method by name."""


def method(  # noqa: PLR0913 - what a method declares about itself, by name
    name: str,
    *,
    scopes: tuple[Scope, ...],
    needs: Iterable[Moment],
    energy_unit: EnergyUnit,
    surrogate: str,
    reference: str,
    coordinate_free: bool = True,
    options: type[MethodOptions] = MethodOptions,
    energies: Energies | None = None,
    at_rank: DecomposeAtRank | None = None,
) -> Callable[[Decompose], Decompose]:
    """Register ``decompose(weight, statistics, options) → Decomposition`` as a method.

    Args:
        name: as given to ``--method``.
        scopes: one projector per input group, or one per layer; the method's own first.
        needs: the moments it must be given, measured on that scope.
        energy_unit: of ``Decomposition.energies``.
        surrogate: the formula whose loss the energies are.
        reference: paper and equation.
        coordinate_free: whether a rotation of the inputs changes nothing.
        options: what the method can be told.
        energies: computes the energies alone, where that is cheaper.
        at_rank: decomposes for one rank, where that is cheaper.
    """

    def register(decompose: Decompose) -> Decompose:
        METHODS.add(
            name,
            Method(
                name=name,
                scopes=scopes,
                moments=frozenset(needs),
                energy_unit=energy_unit,
                surrogate=surrogate,
                reference=reference,
                coordinate_free=coordinate_free,
                decompose=decompose,
                options=options,
                energies=energies,
                at_rank=at_rank,
            ),
        )
        return decompose

    return register


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownNameError: there is none; suggests the nearest.
    """
    return METHODS.find(name)


def solver(name: str, options: Mapping[str, Any] | None = None) -> Solver:
    """A method with its options.

    Args:
        name: of the method.
        options: as plain values; what the method does not declare is refused.

    Raises:
        UnknownNameError: there is no such method.
        UsageError: an option that the method does not have, or a value out of range.
    """
    chosen = get_method(name)
    return Solver(chosen, parse(chosen.options, options or {}, f"method `{name}`"))
