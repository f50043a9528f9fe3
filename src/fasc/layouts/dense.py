"""Dense: the layers stay as they are."""

from collections.abc import Collection
from typing import ClassVar

from fasc.layouts._registry import Layout, layout
from fasc.model.groups import Unit


@layout("dense")
class Dense(Layout):
    """Nothing is done: the whole weight, the bias if there was one."""

    leaves_dense: ClassVar[bool] = True

    def ranks(self, unit: Unit, step: int) -> Collection[int]:
        """The full one."""
        del step
        return (min(unit.d_in, unit.d_out),)

    def maps(self, unit: Unit, rank: int) -> list[tuple[int, int]]:
        """The layers' weights."""
        del rank
        return [(unit.d_in, layer.d_out) for layer in unit.layers]

    def parameters(self, unit: Unit, rank: int) -> int:
        """``d_in · d_out`` and the biases."""
        del rank
        return unit.parameters
