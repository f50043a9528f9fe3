"""The registry of methods: a name, what it must be given, where it comes from."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from fasc.statistics.moments import Moment, Need, Scope, UnitStatistics
from fasc.planning.options import MethodConfig
from fasc.errors import UnknownNameError
from fasc.linalg.decomposition import Decomposition

EnergyUnit = Literal["nats²/token", "output²/token", "input²/token", "weight²", "none"]


Decompose = Callable[[Tensor, UnitStatistics, MethodConfig], Decomposition]
"""``(weight [d_out, d_in] float64, statistics of the unit, options) → the full decomposition``."""


Energies = Callable[[Tensor, UnitStatistics, MethodConfig], Tensor]
"""The same arguments → the energies of that decomposition."""


@dataclass(frozen=True, slots=True)
class Sketched:
    """A decomposition that holds only its leading directions, and how good it is."""

    decomposition: Decomposition
    lost_estimate: float
    """Estimated energy lost against the exact solution, ÷ energy dropped."""

    lost_bound: float
    """Probabilistic bound of the same."""

    exact: bool
    """Whether the bound was beyond the tolerance and the exact solution was taken instead."""


@runtime_checkable
class Sketch(Protocol):
    """Solves a unit for one rank from a sketch, and exactly where the sketch cannot be shown to be good enough."""

    def __call__(
        self, weight: Tensor, statistics: UnitStatistics, options: MethodConfig, rank: int, *, wide: bool = False
    ) -> Sketched:
        """``options.sketch_tolerance`` says what is good enough; ``wide`` asks for the paper's larger sketch."""


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
    energies: Energies | None = None
    """The energies alone, where they can be had without the directions."""

    sketch: Sketch | None = None
    """The sketched form, where there is one."""

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


_OF_THE_INPUT: frozenset[Moment] = frozenset({"input", "magnitude", "product", "rows", "sequences", "taylor"})

METHODS: dict[str, Method] = {}
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
    energies: Energies | None = None,
    sketch: Sketch | None = None,
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
        energies: computes the energies alone, where that is cheaper.
        sketch: solves from a sketch.
    """

    def register(decompose: Decompose) -> Decompose:
        moments = frozenset(needs)
        METHODS[name] = Method(
            name, scopes, moments, energy_unit, surrogate, reference, coordinate_free, decompose, energies, sketch
        )
        return decompose

    return register


def get_method(name: str) -> Method:
    """The method of that name.

    Raises:
        UnknownNameError: there is none; suggests the nearest.
    """
    if name not in METHODS:
        raise UnknownNameError("method", name, METHODS)
    return METHODS[name]
