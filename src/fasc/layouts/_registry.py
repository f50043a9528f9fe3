"""What a layout is, and the registry of layouts.

A layout says everything about one way to store a unit, the layers that share one decomposition: what it costs, which empty
modules it builds, what they are filled with, and whether a structure read from a file makes sense. Nothing else in fasc knows a
layout by its name.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fasc.errors import ModelError
from fasc.layouts._replacement import MARK, Replacement, mark
from fasc.linalg.decomposition import Factorization
from fasc.model.groups import Scope, Unit
from fasc.registry import Registry
from fasc.statistics.accumulators import Covariance

INDEX_BYTES = 4
"""Of an entry of an index (int32)."""

Facts = Mapping[str, Any]
"""What of a unit's structure its rank does not say, as plain JSON values."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """A unit in a layout: what the modules hold."""

    states: Sequence[Mapping[str, Tensor]]
    """For each layer of the unit, the state of its module; the mark is added."""

    facts: Facts = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "states", [{MARK: mark(), **state} for state in self.states])


class Layout(ABC):
    """One way to store a unit of rank k. Costs count everything that is stored, the bias that corrects the mean included."""

    name: ClassVar[str]
    """As given to ``--layouts``; set by :func:`layout`."""

    default: ClassVar[bool] = True
    """Whether a plan may use it without being told to."""

    leaves_dense: ClassVar[bool] = False
    """Whether the unit stays as it is: no edit is made."""

    last_resort: ClassVar[bool] = False
    """Whether it is taken only at ranks at which no other layout is below the dense size."""

    extra_products: ClassVar[int] = 0
    """Matrix products of a forward pass beyond the dense layers' own, however many layers share a projection."""

    extra_copies: ClassVar[int] = 0
    """Rearrangements of activations in a forward pass."""

    asks_for: ClassVar[Scope | None] = None
    """The scope that a plan is restricted to where this layout is named; ``None`` leaves it open."""

    def suited(self, unit: Unit) -> "Layout":
        """The form of this layout for a unit of so many layers."""
        del unit
        return self

    def ranks(self, unit: Unit, step: int) -> Collection[int]:
        """The ranks that a plan may choose."""
        return range(step, min(unit.d_in, unit.d_out), step)

    @abstractmethod
    def parameters(self, unit: Unit, rank: int) -> int:
        """Everything that is stored: weights, biases, indices."""

    def indices(self, unit: Unit, rank: int) -> int:
        """Entries of :meth:`parameters` that are int32 whatever the precision of the weights."""
        del unit, rank
        return 0

    def multiply_adds(self, unit: Unit, rank: int) -> int:
        """Per token: those of :meth:`maps`; a layout without maps says them itself."""
        maps = self.maps(unit, rank)
        if not maps:
            raise NotImplementedError(f"layout `{self.name}` says neither `maps` nor `multiply_adds`")
        return sum(inputs * outputs for inputs, outputs in maps)

    def maps(self, unit: Unit, rank: int) -> list[tuple[int, int]]:
        """Inputs and outputs of every matrix that the unit is stored in.

        Those of several layers that read the same count as one where the rank alone does not say which has how many outputs. None
        where the layout's matrices cannot be rounded.
        """
        del unit, rank
        return []

    def bytes(self, unit: Unit, rank: int, bytes_per_parameter: int) -> int:
        """On disk and in memory, with weights of that precision."""
        indices = self.indices(unit, rank)
        return (self.parameters(unit, rank) - indices) * bytes_per_parameter + indices * INDEX_BYTES


class FactoredLayout(Layout):
    """A layout that an edit puts in the place of the dense layers."""

    @abstractmethod
    def encode(self, unit: Unit, factors: Factorization, bias: Tensor, inputs: Covariance) -> Encoded:
        """The modules' contents.

        Args:
            unit: the layers.
            factors: of the stacked weight, float64; ``up · down`` has the rank.
            bias: of the unit's outputs, the layers' own biases and the correction of the mean together, [d_out].
            inputs: mean and covariance of the unit's input, where the layout has a choice to make.
        """

    @abstractmethod
    def build(self, unit: Unit, rank: int, facts: Facts) -> list[nn.Module]:
        """Empty replacements of the right shape, one for each layer, on the default device and in the default precision."""

    def largest_rank(self, unit: Unit) -> int:
        """Above it the layout has no modules for the unit."""
        return max(unit.d_in, unit.d_out)

    def check(self, unit: Unit, rank: int, facts: Facts) -> None:
        """Refuse a structure that no unit of this shape can have.

        Raises:
            ModelError: names the unit and the number.
        """
        del facts
        if not 1 <= rank <= self.largest_rank(unit):
            raise ModelError(
                f"`{unit.name}` is {unit.d_out}×{unit.d_in} and cannot have rank {rank} in layout `{self.name}`",
                "the plan or checkpoint is damaged",
            )

    def dense(self, module: nn.Module) -> tuple[Tensor, Tensor]:
        """The weight [d_out, d_in] and bias [d_out] that a filled module stands for."""
        assert isinstance(module, Replacement)  # noqa: S101 - layouts build nothing else
        return module.product()


LAYOUTS: Registry[Layout] = Registry("layout", "fasc.layouts")
"""Every registered layout by name."""


def layout(name: str) -> Callable[[type[Layout]], type[Layout]]:
    """Register a subclass of :class:`Layout` under a name."""

    def register(kind: type[Layout]) -> type[Layout]:
        kind.name = name
        LAYOUTS.add(name, kind())
        return kind

    return register


def layouts_named(names: Iterable[str] | None) -> list[Layout]:
    """The layouts of these names, or those that a plan may use by default.

    Raises:
        UnknownNameError: there is no such layout.
    """
    if names is None:
        return [one for one in LAYOUTS.values() if one.default]
    return [LAYOUTS.find(name) for name in names]


def split_rows(unit: Unit, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """The rows of each layer of a unit."""
    sizes = [layer.d_out for layer in unit.layers]
    return list(zip(*(torch.split(tensor, sizes) for tensor in tensors), strict=True))
