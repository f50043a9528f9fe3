"""Pivoted columns: k inputs as they are, the others through what they add to those (a column interpolative decomposition)."""

from collections.abc import Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from fasc.layouts._registry import Encoded, FactoredLayout, Facts, layout, split_rows
from fasc.layouts.factors import LinearMap, LowRankLinear, share
from fasc.linalg.decomposition import Factorization
from fasc.linalg.pivot import pivoted_form
from fasc.model.groups import Unit
from fasc.statistics.accumulators import Covariance

_SMALLEST = 1e-8
"""Variance of an input, relative to the mean, below which it counts as dead."""


class PivotColumns(nn.Module):
    """The projection of a unit that keeps ``rank`` of its inputs: ``x ↦ x_pivots + rest(x_others)``.

    ``order`` lists the pivots and then the others. Where :class:`~fasc.layouts.pivoted.PivotedLinear` orders the outputs of every
    layer, this orders the inputs, once for the unit.
    """

    order: Tensor

    def __init__(self, d_in: int, rank: int) -> None:
        super().__init__()
        self.rank = rank
        self.rest = nn.Linear(d_in - rank, rank, bias=False)
        self.register_buffer("order", torch.arange(d_in, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """[… d_in] → [… rank]."""
        ordered = x.reshape(-1, x.shape[-1]).index_select(1, self.order)
        output = ordered[:, : self.rank] + self.rest(ordered[:, self.rank :])
        result: Tensor = output.view(*x.shape[:-1], self.rank)
        return result

    def linear_maps(self) -> Iterator[LinearMap]:
        """``rest``, which reads the inputs that are no pivots."""
        others = torch.eye(len(self.order), dtype=self.rest.weight.dtype, device=self.order.device)[self.order[self.rank :]]
        if isinstance(self.rest, nn.Linear):
            yield LinearMap("down.rest", others)

    @property
    def weight(self) -> Tensor:
        """The whole map, [rank, d_in]."""
        pivots = torch.eye(self.rank, dtype=self.rest.weight.dtype, device=self.rest.weight.device)
        return torch.cat((pivots, self.rest.weight), dim=1)[:, self.order.argsort()]


@layout("pivoted-columns")
class PivotedColumns(FactoredLayout):
    """k inputs as they are and the others as combinations for them: ``k (d_in + Σ d_out) − k²`` and an order."""

    extra_products: ClassVar[int] = 1
    extra_copies: ClassVar[int] = 1

    def parameters(self, unit: Unit, rank: int) -> int:
        """Weights, a bias, and the order of the inputs."""
        return rank * (unit.d_in + unit.d_out) - rank * rank + unit.d_out + unit.d_in

    def maps(self, unit: Unit, rank: int) -> list[tuple[int, int]]:
        """What the other inputs add to the pivots, and ``up``."""
        return [(unit.d_in - rank, rank), *((rank, layer.d_out) for layer in unit.layers)]

    def indices(self, unit: Unit, rank: int) -> int:
        """The order of the inputs."""
        del rank
        return unit.d_in

    def encode(self, unit: Unit, factors: Factorization, bias: Tensor, inputs: Covariance) -> Encoded:
        """Pivots are the inputs that move the outputs most, as far as each varies.

        Column j of the product counts in an orthonormal basis of the outputs, times the spread of input j. No other input then
        adds much to a pivot in comparison, and small coefficients in the units of the inputs are what low precision needs.
        """
        variance = inputs.matrix.diagonal().to(factors.down)
        spread = variance.clamp_min(_SMALLEST * variance.mean()).sqrt()
        triangle = torch.linalg.qr(factors.up, mode="r").R
        form = pivoted_form((triangle @ factors.down).mT * spread[:, None])
        rest = form.coefficients.mT * spread[form.pivots][:, None] / spread[form.others]
        up = factors.up @ factors.down[:, form.pivots]
        states: list[dict[str, Tensor]] = [{"up.weight": own, "up.bias": b} for own, b in split_rows(unit, up, bias)]
        order = torch.cat((form.pivots, form.others)).to(torch.int32)
        states[0] |= {"down.rest.weight": rest, "down.order": order}
        return Encoded(states)

    def largest_rank(self, unit: Unit) -> int:
        """One input is no pivot."""
        return unit.d_in - 1

    def build(self, unit: Unit, rank: int, facts: Facts) -> list[nn.Module]:
        """A :class:`~fasc.layouts.factors.LowRankLinear` for each layer."""
        del facts
        layers = [LowRankLinear(unit.d_in, one.d_out, nn.Linear(rank, one.d_out, bias=True)) for one in unit.layers]
        return share(PivotColumns(unit.d_in, rank), layers)
