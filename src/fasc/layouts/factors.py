"""Two factors: ``down`` and ``up`` of one layer, or one ``down`` for layers that read the same tensor and an ``up`` for each."""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from fasc.layouts._registry import LAYOUTS, Encoded, FactoredLayout, Facts, Layout, layout, split_rows
from fasc.layouts._replacement import Replacement
from fasc.linalg.decomposition import Factorization
from fasc.model.groups import Scope, Unit
from fasc.statistics.accumulators import Covariance


class LinearMap(NamedTuple):
    """A matrix of a layer as it is stored, and what it reads: ``A x + b`` of the layer's input ``x``."""

    path: str
    """From the layer to the module; empty where the layer is the module."""

    matrix: Tensor | None = None
    """``A``, [what it reads, d_in]; ``None`` for the input itself."""

    offset: Tensor | None = None
    """``b``; ``None`` for 0."""


class Once:
    """What several layers read: computed once per forward pass.

    The first consumer computes it and leaves the result here. The others, called with the *same tensor object*, take it, and the
    last one clears it. A consumer that is called with another tensor computes it again, so the result is right in any order of
    calls, also if the tensor was changed in place (tensors made in inference mode excepted: their changes are not counted).
    Nothing is left here while the map itself is trained, because its weight may change between two calls.

    Args:
        consumers: how many layers there are.
    """

    def __init__(self, consumers: int) -> None:
        self.consumers = consumers
        self._clear()

    def _clear(self) -> None:
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._changes = self._left = 0

    def __call__(self, compute: nn.Module, input: Tensor) -> Tensor:
        """What the module gives for the input, [… d_in] → [… rank]."""
        output: Tensor
        if torch.is_grad_enabled() and any(one.requires_grad for one in compute.parameters()):
            output = compute(input)
            return output
        changes = _changes_of(input)
        if self._left > 0 and self._input is input and self._changes == changes and self._output is not None:
            output = self._output
            self._left -= 1
            if self._left == 0:
                self._clear()
            return output
        output = compute(input)
        self._input, self._output, self._changes, self._left = input, output, changes, self.consumers - 1
        return output

    def __getstate__(self) -> dict[str, Any]:
        """A copy holds no activations."""
        return {**vars(self), "_input": None, "_output": None, "_left": 0}


def _changes_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; compilers follow that themselves."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


class LowRankLinear(Replacement):
    """``x ↦ up(down(x))`` in the place of a dense layer ``d_in → d_out``.

    ``up`` has a bias: the layer's own, if any, and the correction of the mean. In a unit of several layers only the first holds
    ``down``; the others read it from there. Both are ordinary ``nn.Linear``s, so that other tools know what to do with them.

    Args:
        d_in: features of the input.
        d_out: output features.
        up: the second factor.
    """

    def __init__(self, d_in: int, d_out: int, up: nn.Linear | None) -> None:
        super().__init__(d_in, d_out)
        self.up = up
        self.register_module("down", None)
        # A tuple hides the first layer from nn.Module, so that its parameters are not listed twice.
        self._first: tuple[LowRankLinear, ...] = ()
        self._once: Once | None = None

    @property
    def projection(self) -> Any:
        """The module that is ``down``, here or in the first layer of the unit."""
        return self._first[0].down if self._first else self.down

    def linear_maps(self) -> Iterator[LinearMap]:
        """The matrices that this layer holds, in the order in which they are used; ``A`` and ``b`` are those of the moment."""
        down: Any = self.down
        if isinstance(down, nn.Linear):
            yield LinearMap("down")
        elif hasattr(down, "linear_maps"):
            yield from down.linear_maps()
        if self.up is not None:
            yield LinearMap("up", self.projection.weight, getattr(self.projection, "bias", None))

    def felt(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What errors of the projection's outputs [rank] and of ``up``'s [n] count, if those of the outputs count ``scale``."""
        assert self.up is not None  # noqa: S101 - only pivoted layers may do without
        return self.up.weight.square().mT @ scale, scale

    def project(self, x: Tensor) -> Tensor:
        """``down · x``, [… d_in] → [… rank]."""
        result: Tensor = self.projection(x) if self._once is None else self._once(self.projection, x)
        return result

    def forward(self, x: Tensor) -> Tensor:
        """Map […, d_in] to […, d_out]."""
        result: Tensor = self.up(self.project(x))
        return result

    def product(self) -> tuple[Tensor, Tensor]:
        """``up · down`` [d_out, d_in], and the bias [d_out]."""
        assert self.up is not None  # noqa: S101 - only pivoted layers may do without
        return self.up.weight @ self.projection.weight, self.up.bias

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        shared = ", shared" if self._first else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{shared}"


def share(projection: nn.Module, layers: Sequence[LowRankLinear]) -> list[nn.Module]:
    """Give the first layer the projection and let the others read it there."""
    first, *others = layers
    first.down = projection
    if others:
        once = Once(len(layers))
        for layer in layers:
            layer._once = once
        for layer in others:
            layer._first = (first,)
    return list(layers)


class _TwoFactors(FactoredLayout):
    extra_products: ClassVar[int] = 1

    def suited(self, unit: Unit) -> Layout:
        """Separate factors for one layer, a shared projector for several."""
        return LAYOUTS["factors" if len(unit.layers) == 1 else "shared"]

    def maps(self, unit: Unit, rank: int) -> list[tuple[int, int]]:
        """``down`` and ``up``."""
        return [(unit.d_in, rank), *((rank, layer.d_out) for layer in unit.layers)]

    def parameters(self, unit: Unit, rank: int) -> int:
        """``k (d_in + Σ d_out)`` and a bias."""
        return rank * (unit.d_in + unit.d_out) + unit.d_out

    def encode(self, unit: Unit, factors: Factorization, bias: Tensor, inputs: Covariance) -> Encoded:
        """``up`` by layer, ``down`` with the first."""
        del inputs
        states: list[dict[str, Tensor]] = [{"up.weight": up, "up.bias": own} for up, own in split_rows(unit, factors.up, bias)]
        states[0]["down.weight"] = factors.down
        return Encoded(states)

    def build(self, unit: Unit, rank: int, facts: Facts) -> list[nn.Module]:
        """A :class:`LowRankLinear` for each layer."""
        del facts
        layers = [LowRankLinear(unit.d_in, one.d_out, nn.Linear(rank, one.d_out, bias=True)) for one in unit.layers]
        return share(nn.Linear(unit.d_in, rank, bias=False), layers)


@layout("factors")
class Factors(_TwoFactors):
    """``down`` and ``up`` of one layer: ``k (d_in + d_out)``."""

    asks_for: ClassVar[Scope | None] = "layer"


@layout("shared")
class Shared(_TwoFactors):
    """One ``down`` for the layers that read the same tensor, an ``up`` for each: ``k (d_in + Σ d_out)``."""

    asks_for: ClassVar[Scope | None] = "group"
