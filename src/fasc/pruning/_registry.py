"""The registry of pruning methods, and the lookup of any method by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fasc.errors import UnknownNameError
from fasc.methods import METHODS, Method
from fasc.methods.options import MethodOptions
from fasc.registry import Registry
from fasc.statistics.moments import GroupStatistics, Moment, Need

Score = Callable[[Tensor, GroupStatistics], Tensor]
"""(weight [d_out, d_in] float32, statistics of its group) → the score of each weight; the lowest go."""

Importance = Callable[[GroupStatistics, int], Tensor]
"""(statistics of the consumer's group, number of parts) → the importance of each part; the least go."""


@dataclass(frozen=True, slots=True)
class Pruning:
    """A registered pruning method."""

    name: str
    moments: frozenset[Moment]
    """What it must be given of every group, beside the covariance of the inputs."""

    surrogate: str
    """What it keeps, as a formula."""

    reference: str
    summary: str

    @property
    def needs(self) -> frozenset[Need]:
        """The moments it must be given."""
        return frozenset({Need("input", "group")} | {Need(moment, "group") for moment in self.moments})

    @property
    def options(self) -> type[MethodOptions]:
        """What it can be told: what every method can."""
        return MethodOptions


@dataclass(frozen=True, slots=True)
class Unstructured(Pruning):
    """Zeros are written, and stay stored."""

    score: Score
    by_row: bool
    """Whether scores are compared within an output row or within the whole layer."""


@dataclass(frozen=True, slots=True)
class Structured(Pruning):
    """Whole heads and channels go, so that the checkpoint is smaller."""

    importance: Importance


PRUNINGS: Registry[Pruning] = Registry("pruning method", "fasc.pruning")
"""Every registered pruning method by name."""


def register(pruning: Pruning) -> None:
    """Make a pruning method known."""
    PRUNINGS.add(pruning.name, pruning)


def get_unstructured(name: str) -> Unstructured:
    """The unstructured method of that name.

    Raises:
        UnknownNameError: there is none.
    """
    pruning = PRUNINGS.find(name)
    if not isinstance(pruning, Unstructured):
        raise UnknownNameError(
            "unstructured pruning method", name, [n for n, p in PRUNINGS.items() if isinstance(p, Unstructured)]
        )
    return pruning


def get_structured(name: str) -> Structured:
    """The structured method of that name.

    Raises:
        UnknownNameError: there is none.
    """
    pruning = PRUNINGS.find(name)
    if not isinstance(pruning, Structured):
        raise UnknownNameError("structured pruning method", name, [n for n, p in PRUNINGS.items() if isinstance(p, Structured)])
    return pruning


def find_method(name: str) -> Method | Pruning:
    """The method of that name, of either kind.

    Raises:
        UnknownNameError: there is none; suggests the nearest.
    """
    if name in METHODS:
        return METHODS[name]
    if name in PRUNINGS:
        return PRUNINGS[name]
    raise UnknownNameError("method", name, [*METHODS, *PRUNINGS])
