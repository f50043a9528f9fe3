"""Merged: the low-rank product as one dense matrix with a bias."""

from collections.abc import Iterator
from typing import ClassVar

from torch import Tensor, nn

from fasc.layouts._registry import Encoded, FactoredLayout, Facts, layout, split_rows
from fasc.layouts._replacement import Replacement
from fasc.layouts.factors import LinearMap
from fasc.linalg.decomposition import Factorization
from fasc.model.groups import Unit
from fasc.statistics.accumulators import Covariance


class MergedLinear(Replacement):
    """A dense layer with a bias, where the model may build one without."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__(d_in, d_out)
        self.whole = nn.Linear(d_in, d_out, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Map […, d_in] to […, d_out]."""
        result: Tensor = self.whole(x)
        return result

    def linear_maps(self) -> Iterator[LinearMap]:
        """Its one matrix."""
        yield LinearMap("whole")

    def product(self) -> tuple[Tensor, Tensor]:
        """Its own weight and bias."""
        return self.whole.weight, self.whole.bias


@layout("merged")
class Merged(FactoredLayout):
    """For a rank that saves nothing: the product multiplied out. It shows what a rank loses, and is as large as before."""

    default: ClassVar[bool] = False
    last_resort: ClassVar[bool] = True

    def maps(self, unit: Unit, rank: int) -> list[tuple[int, int]]:
        """The product."""
        del rank
        return [(unit.d_in, layer.d_out) for layer in unit.layers]

    def parameters(self, unit: Unit, rank: int) -> int:
        """``d_in · d_out`` and a bias."""
        del rank
        return unit.d_in * unit.d_out + unit.d_out

    def encode(self, unit: Unit, factors: Factorization, bias: Tensor, inputs: Covariance) -> Encoded:
        """The rows of ``up · down``."""
        del inputs
        return Encoded([{"whole.weight": up @ factors.down, "whole.bias": own} for up, own in split_rows(unit, factors.up, bias)])

    def build(self, unit: Unit, rank: int, facts: Facts) -> list[nn.Module]:
        """A :class:`MergedLinear` for each layer."""
        del rank, facts
        return [MergedLinear(layer.d_in, layer.d_out) for layer in unit.layers]
