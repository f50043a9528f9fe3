"""Pivoted: k rows of the low-rank product as they are, the other rows as combinations of them (PIFA, arXiv:2501.19090)."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from fasc.errors import ModelError
from fasc.layouts._registry import Encoded, FactoredLayout, Facts, layout
from fasc.layouts.factors import LowRankLinear, share
from fasc.linalg.decomposition import Factorization
from fasc.linalg.pivot import pivoted_form
from fasc.linalg.psd import cholesky, damped
from fasc.model.groups import Unit
from fasc.statistics.accumulators import Covariance

_WHITE = 1e-8
"""Relative damping of the coordinates' covariance, which only decides which rows are kept."""


class PivotedLinear(LowRankLinear):
    """A low-rank layer that keeps some of its output rows as they are and makes the others of them.

    The pivot rows of all layers of a unit lie in one projection with a bias; ``start:stop`` are this layer's own. ``up`` makes
    the other rows from all pivots, its bias less what the pivots' bias already brings; a layer whose rows are all pivots has
    none. ``order`` says where each output lies in (own pivot rows, other rows).

    Args:
        d_in: features of the input.
        d_out: output features.
        rank: pivot rows of the whole unit.
        own: ``(start, stop)`` of this layer's pivots among them.
    """

    order: Tensor

    def __init__(self, d_in: int, d_out: int, rank: int, own: tuple[int, int]) -> None:
        others = d_out - (own[1] - own[0])
        super().__init__(d_in, d_out, nn.Linear(rank, others, bias=True) if others else None)
        self.start, self.stop = own
        self.register_buffer("order", torch.arange(d_out, dtype=torch.int32))

    def felt(self, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Pivots count as their own rows and in all others."""
        own, others = scale[self.order.argsort()].tensor_split([self.stop - self.start])
        projection = scale.new_zeros(self.projection.out_features)
        projection[self.start : self.stop] = own
        return projection if self.up is None else projection + self.up.weight.square().mT @ others, others

    def forward(self, x: Tensor) -> Tensor:
        """Map […, d_in] to […, d_out]."""
        # Flat, because on a CPU ordering the columns of a matrix is faster than the last axis of a larger tensor (decision 0005).
        pivots = self.project(x)
        pivots = pivots.reshape(-1, pivots.shape[-1])
        own = pivots[:, self.start : self.stop]
        outputs = own if self.up is None else torch.cat((own, self.up(pivots)), dim=1)
        return outputs.index_select(1, self.order).view(*x.shape[:-1], self.out_features)

    def product(self) -> tuple[Tensor, Tensor]:
        """The dense weight [d_out, d_in] and bias [d_out], in the order of the layer's outputs."""
        rows, pivots = self.projection.weight, self.projection.bias
        weights, biases = [rows[self.start : self.stop]], [pivots[self.start : self.stop]]
        if self.up is not None:
            weights.append(self.up.weight @ rows)
            biases.append(self.up.bias + self.up.weight @ pivots)
        return torch.cat(weights)[self.order], torch.cat(biases)[self.order]


@layout("pivoted")
class PivotedRows(FactoredLayout):
    """k output rows as they are and the others as combinations of them: ``k (d_in + Σ d_out) − k²`` and an order."""

    extra_products: ClassVar[int] = 1
    extra_copies: ClassVar[int] = 2

    def parameters(self, unit: Unit, rank: int) -> int:
        """Weights, a bias, and the order of the outputs."""
        return rank * (unit.d_in + unit.d_out) - rank * rank + 2 * unit.d_out

    def maps(self, unit: Unit, rank: int) -> list[tuple[int, int]]:
        """The pivot rows, and the coefficients of the others."""
        return [(unit.d_in, rank), (rank, unit.d_out - rank)]

    def indices(self, unit: Unit, rank: int) -> int:
        """The order of the outputs."""
        del rank
        return unit.d_out

    def encode(self, unit: Unit, factors: Factorization, bias: Tensor, inputs: Covariance) -> Encoded:
        """Pivot rows far from the span of each other, by distances of the outputs; then the others in them."""
        covariance = factors.down @ inputs.matrix.to(factors.down) @ factors.down.mT
        white = cholesky(damped(covariance, _WHITE), where=f"`{unit.name}`: the coordinates'", tokens=0)
        form = pivoted_form(factors.up @ white)
        bias_of_pivots = bias[form.pivots]
        bias_of_others = bias[form.others] - form.coefficients @ bias_of_pivots
        states, counts, start = [], [], 0
        for layer in unit.layers:
            stop = start + layer.d_out
            mine = (form.others >= start) & (form.others < stop)
            own = form.pivots[(form.pivots >= start) & (form.pivots < stop)]
            places = torch.cat([own, form.others[mine]]) - start
            state = {"order": places.argsort().to(torch.int32)}
            if bool(mine.any()):
                state |= {"up.weight": form.coefficients[mine], "up.bias": bias_of_others[mine]}
            states.append(state)
            counts.append(len(own))
            start = stop
        states[0] |= {"down.weight": factors.up[form.pivots] @ factors.down, "down.bias": bias_of_pivots}
        return Encoded(states, {"pivots": counts})

    def build(self, unit: Unit, rank: int, facts: Facts) -> list[nn.Module]:
        """A :class:`PivotedLinear` for each layer."""
        layers = [
            PivotedLinear(unit.d_in, layer.d_out, rank, own)
            for layer, own in zip(unit.layers, _own_rows(facts["pivots"]), strict=True)
        ]
        return share(nn.Linear(unit.d_in, rank, bias=True), layers)

    def largest_rank(self, unit: Unit) -> int:
        """All rows are pivots."""
        return unit.d_out

    def check(self, unit: Unit, rank: int, facts: Facts) -> None:
        """Each layer's pivots are some of its rows, and together they are the rank."""
        super().check(unit, rank, facts)
        counts = facts.get("pivots")
        if not isinstance(counts, list) or not _fit(counts, unit, rank):
            raise ModelError(
                f"`{unit.name}`: pivots {counts} do not make rank {rank}", "the checkpoint is damaged; compress again"
            )


def _fit(counts: list[object], unit: Unit, rank: int) -> bool:
    numbers = [count for count in counts if type(count) is int]
    whole = len(numbers) == len(counts) == len(unit.layers) and sum(numbers) == rank
    return whole and all(0 <= count <= layer.d_out for count, layer in zip(numbers, unit.layers, strict=True))


def _own_rows(counts: Sequence[int]) -> list[tuple[int, int]]:
    """Start and stop of each layer's own pivots."""
    return list(pairwise([0, *accumulate(counts)]))
