"""The modules that stand where a dense layer was."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SharedProjection(nn.Linear):
    """``x ↦ x · downᵀ``, computed once per forward pass for all layers that read the same tensor.

    The first reader computes and leaves the result here; the others, called with the *same tensor object*, take it; the
    last one clears it. A reader that gets another tensor recomputes, so the result is right in any order of calls. Nothing
    is kept while the projection itself is trained, because its weight may change between two calls.
    """

    def __init__(self, d_in: int, rank: int, readers: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(d_in, rank, bias=False, dtype=dtype)
        self.readers = readers
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._left = 0

    def forward(self, input: Tensor) -> Tensor:
        """Project ``[…, d_in]`` to ``[…, rank]``."""
        if self.readers == 1 or (self.weight.requires_grad and torch.is_grad_enabled()):
            return F.linear(input, self.weight)
        if self._left > 0 and self._input is input and self._output is not None:
            output = self._output
            self._left -= 1
            if self._left == 0:
                self._input = self._output = None
            return output
        output = F.linear(input, self.weight)
        self._input, self._output, self._left = input, output, self.readers - 1
        return output

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedProjection":
        copy = SharedProjection(self.in_features, self.out_features, self.readers, dtype=self.weight.dtype)
        copy.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self.weight.requires_grad)
        copy.training = self.training
        memo[id(self)] = copy
        return copy


class LowRankLinear(nn.Module):
    """``x ↦ up(down(x))`` in place of a dense layer ``d_in → d_out``.

    ``up`` always has a bias: it holds the layer's own one, if any, and the correction of the mean. In a group of layers with
    one projector only the first holds ``down``; the others read it from there.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = d_in, d_out, rank
        self.up = nn.Linear(rank, d_out, bias=True, dtype=dtype)
        self.down: SharedProjection | None
        self.register_module("down", None)
        # A tuple hides the owner from nn.Module, so that its parameters are not listed twice.
        self._owner: tuple[LowRankLinear, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[…, d_in]`` to ``[…, d_out]``."""
        projection = self._owner[0].down if self._owner else self.down
        assert projection is not None  # noqa: S101 - link_group gives every layer one
        result: Tensor = self.up(projection(x))
        return result

    @property
    def weight(self) -> Tensor:
        """The dense ``up · down``, [d_out, d_in], computed when asked for."""
        projection = self._owner[0].down if self._owner else self.down
        assert projection is not None  # noqa: S101
        return self.up.weight @ projection.weight

    @property
    def bias(self) -> Tensor:
        """The bias of ``up``."""
        return self.up.bias

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        shared = ", shared" if self._owner else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{shared}"


def link_group(layers: Sequence[LowRankLinear]) -> None:
    """Give the first layer the projection and let the others read it there."""
    first, *others = layers
    first.down = SharedProjection(first.in_features, first.rank, len(layers), dtype=first.up.weight.dtype)
    for layer in others:
        layer._owner = (first,)
