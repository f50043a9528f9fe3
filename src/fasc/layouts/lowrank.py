"""The modules that stand where a dense layer was."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from math import gcd
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, get_num_threads, is_autocast_enabled, is_grad_enabled, nn
from torch.compiler import is_compiling
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

_MANY = 2**15
"""Weights from which reading them is worth a second thread."""

_FEW, _FEWEST, _ONE = 16, 4, 1
"""Tokens up to which reading the weights takes longer than the arithmetic, and up to which by far."""


def by_all_threads(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """``F.linear`` of a few float32 tokens on a CPU: each thread reads its share of the weight's rows.

    Decoding is bound by reading weights, and on some processors the products behind ``F.linear`` read them with one thread for
    one token and hardly faster for sixteen; on others they are the faster ones, so it is tried (both measured: docs/log.md).
    A batched product is spread over the threads, and a batch of slices of the rows is a view. For two to four tokens it is the
    product from the other side, ``(weight · xᵀ)ᵀ``.

    Args:
        x: [..., d_in].
        weight: [d_out, d_in].
        bias: added to the product, [d_out] or [tokens, d_out].

    Returns:
        [..., d_out], or ``None`` where the ordinary product is the better one.
    """
    # Compiling comes before any size is looked at: each would be a condition to compile again for.
    if is_compiling() or is_grad_enabled() or not weight.is_cpu or not (counts := _divided_here(threads := get_num_threads())):
        return None
    d_out, d_in = weight.shape
    tokens = x.numel() // d_in
    if not 0 < tokens <= _FEW or weight.dtype != torch.float32 or d_out * d_in < _MANY or not weight.is_contiguous():
        return None
    parts = gcd(d_out, threads)
    upto = _ONE if tokens == 1 else _FEWEST if tokens <= _FEWEST else _FEW
    if upto not in counts or parts == 1 or (tokens > 1 and parts < threads):  # several tokens keep several threads busy anyway
        return None
    found = _by_all_threads(x.reshape(tokens, d_in), weight, bias, parts)
    return found.view(*x.shape[:-1], d_out)


def _by_all_threads(rows: Tensor, weight: Tensor, bias: Tensor | None, parts: int) -> Tensor:
    (tokens, d_in), d_out = rows.shape, len(weight)
    if 1 < tokens <= _FEWEST:
        found = weight @ rows.mT if bias is None else torch.addmm(bias.view(-1, d_out).mT, weight, rows.mT)
        return found.mT.contiguous()
    slices = weight.view(parts, d_out // parts, d_in).mT
    rows = rows.expand(parts, tokens, d_in)
    if bias is None:
        found = torch.bmm(rows, slices)
    else:
        found = torch.baddbmm(bias.view(-1, parts, d_out // parts).transpose(0, 1), rows, slices)
    return found.transpose(0, 1).reshape(tokens, d_out)


@cache
def _divided_here(threads: int) -> frozenset[int]:
    """Up to how many tokens (``_ONE``, ``_FEWEST``, ``_FEW``) this machine is faster when the threads divide the weight's rows.

    Tried once per process, in turn, in a few hundredths of a second, on more weights than the cache of one core holds.
    """
    if threads == 1 or not torch.backends.mkl.is_available():  # without MKL one thread goes through the batch
        return frozenset()
    weights = [torch.full((_TRIED_ROWS * threads, _TRIED_COLUMNS), 1e-3) for _ in range(_TRIED)]

    def seconds(product: Callable[[Tensor], Tensor]) -> float:
        start = perf_counter()
        for weight in weights:
            product(weight)
        return perf_counter() - start

    found = set()
    with torch.no_grad():
        for tokens in (_ONE, _FEWEST, _FEW):
            rows = torch.ones(tokens, _TRIED_COLUMNS)
            ordinary = partial(F.linear, rows)
            divided = partial(_by_all_threads, rows, bias=None, parts=threads)
            turns = [(seconds(ordinary), seconds(divided)) for _ in range(_TURNS)]
            if median(two for _, two in turns) < _CLEARLY * median(one for one, _ in turns):
                found.add(tokens)
    return frozenset(found)


_TRIED, _TRIED_ROWS, _TRIED_COLUMNS, _TURNS = 8, 384, 576, 7
_CLEARLY = 0.9
"""The share of the ordinary product's time below which the other one is taken."""


def at_inference(x: Tensor, weight: Tensor) -> bool:
    """Whether results may be written in place and products chosen by the number of tokens.

    Not with gradients, while compiling (a size that is looked at is a condition to compile again for) and in autocast, which
    knows nothing of products in place.
    """
    return not (is_compiling() or is_grad_enabled() or x.dtype != weight.dtype or is_autocast_enabled(x.device.type))


def is_one(x: Tensor, d_in: int, weight: Tensor) -> bool:
    """Whether ``x`` is one float32 token on a CPU, whose products are faster as those of a matrix and a vector.

    Where one product follows another; a layer with one product gains nothing by it in a model (docs/log.md).
    """
    return (
        not is_compiling()
        and x.numel() == d_in == x.size(-1)
        and weight.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and not is_grad_enabled()
        and not is_autocast_enabled("cpu")
        and _ONE not in _divided_here(get_num_threads())
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``, in the fastest way known for this number of tokens on this machine."""
    found = by_all_threads(x, weight, bias)
    return F.linear(x, weight, bias) if found is None else found


def calls_nothing_else(down: nn.Module, up: nn.Module) -> bool:
    """Whether calling these factors does nothing but their own products, so that their weights may be used without the calls.

    In decoding, the calls of a layer's two factors take as long as one of its products (docs/log.md). Hooks, a new ``forward``
    (accelerate's offloading) and other modules in their place (adapters) need the calls; so does training.

    Written out, because in decoding each object that is looked at is a miss of the cache, which the weights have filled.
    """
    return not (
        is_compiling()
        or is_grad_enabled()
        or _has_any_global_hook()
        or type(down) not in _OWN
        or type(up) not in _OWN
        or down._forward_hooks
        or down._forward_pre_hooks
        or up._forward_hooks
        or up._forward_pre_hooks
        or "forward" in down.__dict__
        or "forward" in up.__dict__
    )


def in_order(columns: Tensor, order: Tensor) -> Tensor:
    """``columns[:, order]`` of a permutation, [tokens, features]: its gradient puts columns back instead of adding them up."""
    return _InOrder.apply(columns, order) if torch.is_grad_enabled() else columns.index_select(1, order)


class _InOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, columns: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return columns.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return gradient.index_select(1, order.argsort()), None


class FactorLinear(nn.Linear):
    """``nn.Linear`` with the fastest product for few tokens."""

    def _weights(self) -> tuple[Any, Any]:
        """Weight and bias by their dictionary: half a microsecond faster than by name."""
        kept = self._parameters
        try:
            return kept["weight"], kept["bias"]
        except KeyError:  # parametrizations, pruning and sharding keep them elsewhere
            return self.weight, self.bias

    def forward(self, input: Tensor) -> Tensor:
        """[…, in_features] → […, out_features]."""
        return product(input, *self._weights())


class SharedProjection(FactorLinear):
    """``x ↦ x · downᵀ``, computed once per forward pass for all layers that read the same tensor.

    The first reader computes and leaves the result here; the others, called with the *same tensor object*, take it; the
    last one clears it. A reader that gets another tensor recomputes, so the result is right in any order of calls. Nothing
    is kept while the projection itself is trained, because its weight may change between two calls.
    """

    def __init__(self, d_in: int, rank: int, readers: int, *, bias: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__(d_in, rank, bias=bias, dtype=dtype)
        self.readers = readers
        self._input: Tensor | None = None
        self._output: Tensor | None = None
        self._left = 0

    def project(self, input: Tensor) -> Tensor:
        """The projection itself, [d_in last] → [rank last]."""
        return product(input, self.weight, self.bias)

    def of_vector(self, vector: Tensor) -> Tensor:
        """The same of one token, [d_in] → [rank]; for :func:`is_one` only."""
        weight, bias = self._weights()
        return torch.mv(weight, vector) if bias is None else torch.addmv(bias, weight, vector)

    @property
    def matrix(self) -> Tensor:
        """The whole projection, [rank, d_in]."""
        return self.weight

    def forward(self, input: Tensor) -> Tensor:
        """Project, or hand out what another reader of the same tensor has computed."""
        if self.readers == 1 or (self.weight.requires_grad and torch.is_grad_enabled()):
            return self.project(input)
        if self._left > 0 and self._input is input and self._output is not None:
            output = self._output
            self._left -= 1
            if self._left == 0:
                self._input = self._output = None
            return output
        output = self.project(input)
        self._input, self._output, self._left = input, output, self.readers - 1
        return output

    def __deepcopy__(self, memo: dict[int, object]) -> "SharedProjection":
        copy = self._empty_copy()
        for name, parameter in self.named_parameters():
            setattr(copy, name, nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad))
        for name, buffer in self.named_buffers():
            setattr(copy, name, buffer.clone())
        copy.training = self.training
        memo[id(self)] = copy
        return copy

    def _empty_copy(self) -> "SharedProjection":
        return type(self)(self.in_features, self.out_features, self.readers, bias=self.bias is not None, dtype=self.weight.dtype)


class PivotColumns(SharedProjection):
    """The projection of a unit that keeps ``rank`` of its inputs as they are: ``x ↦ x_kept + x_others · weightᵀ``.

    A column interpolative decomposition: where :class:`PivotRows` puts the outputs of every layer in order, this rearranges the
    inputs, once for the unit. ``order`` lists the kept inputs and then the others.
    """

    order: Tensor

    def __init__(self, d_in: int, rank: int, readers: int, *, dtype: torch.dtype | None = None) -> None:
        super().__init__(d_in - rank, rank, readers, dtype=dtype)
        self.register_buffer("order", torch.arange(d_in, dtype=torch.int32))
        self._halves: tuple[Tensor, Tensor, Tensor] | None = None

    def project(self, input: Tensor) -> Tensor:
        """[…, d_in] → […, rank]."""
        shape, weight = input.shape, self.weight
        rows = input.reshape(-1, shape[-1])
        if at_inference(input, weight):
            kept, others = (rows.index_select(1, order) for order in self._orders())
            found = by_all_threads(others, weight, kept)
            output = kept.addmm_(others, weight.mT) if found is None else found
        else:
            kept, others = in_order(rows, self.order).split((self.out_features, self.in_features), 1)
            output = torch.addmm(kept, others, weight.mT)
        return output.view(*shape[:-1], self.out_features)

    def of_vector(self, vector: Tensor) -> Tensor:
        """The same of one token, [d_in] → [rank]; for :func:`is_one` only."""
        kept, others = self._orders()
        return vector.index_select(0, kept).addmv_(self._weights()[0], vector.index_select(0, others))

    def _orders(self) -> tuple[Tensor, Tensor]:
        """Where the kept inputs lie, and where the others: views of ``order``."""
        order = self._buffers["order"]
        if self._halves is None or self._halves[0] is not order:
            assert order is not None  # noqa: S101
            self._halves = (order, order[: self.out_features], order[self.out_features :])
        return self._halves[1:]

    @property
    def matrix(self) -> Tensor:
        """The whole projection, [rank, d_in]."""
        kept = torch.eye(self.out_features, dtype=self.weight.dtype, device=self.weight.device)
        return torch.cat((kept, self.weight), dim=1)[:, self.order.argsort()]

    def _empty_copy(self) -> "SharedProjection":
        rank = self.out_features
        return type(self)(self.in_features + rank, rank, self.readers, dtype=self.weight.dtype)


class PivotRows(SharedProjection):
    """The rows that a pivoted unit keeps as they are; its output is flat, [tokens, rank].

    Flat, because on a CPU putting the columns of a matrix in order takes a quarter of the time that it takes on the last axis of
    a tensor with more axes (docs/decisions/0005).
    """

    def project(self, input: Tensor) -> Tensor:
        """[…, d_in] → [tokens, rank]."""
        return product(input.reshape(-1, input.shape[-1]), self.weight, self.bias)

    def write(self, tokens: Tensor, out: Tensor) -> Tensor:
        """The same written to ``out``, [tokens, d_in] → [tokens, rank]; of one token (:func:`is_one`) [d_in] → [rank]."""
        weight, bias = self._weights()
        return torch.addmv(bias, weight, tokens, out=out) if tokens.dim() == 1 else torch.addmm(bias, tokens, weight.mT, out=out)


class LowRankLinear(nn.Module):
    """``x ↦ up(down(x))`` in place of a dense layer ``d_in → d_out``.

    ``up`` always has a bias: it holds the layer's own one, if any, and the correction of the mean. In a group of layers with
    one projector only the first holds ``down``; the others read it from there.

    Args:
        d_in: features of the input.
        d_out: output features.
        rank: directions kept.
        columns: whether ``down`` keeps ``rank`` inputs as they are (:class:`PivotColumns`).
        dtype: of the weights.
    """

    def __init__(self, d_in: int, d_out: int, rank: int, *, columns: bool = False, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = d_in, d_out, rank
        self.keeps_columns = columns
        self.up = self._make_up(dtype)
        self.down: SharedProjection | None
        self.register_module("down", None)
        # A tuple hides the owner from nn.Module, so that its parameters are not listed twice.
        self._owner: tuple[LowRankLinear, ...] = ()

    def _make_up(self, dtype: torch.dtype | None) -> nn.Linear | None:
        return FactorLinear(self.rank, self.out_features, bias=True, dtype=dtype)

    def make_down(self, readers: int) -> None:
        """Hold the projection, for itself and for the other readers."""
        kind = PivotColumns if self.keeps_columns else SharedProjection
        self.down = kind(self.in_features, self.rank, readers, dtype=self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        assert self.up is not None  # noqa: S101
        return self.up.weight.dtype

    @property
    def projection(self) -> SharedProjection:
        """The module that holds ``down``, here or in the first layer of the group."""
        found = self._owner[0].down if self._owner else self.down
        assert found is not None  # noqa: S101 - link_group gives every layer one
        return found

    def _factors(self) -> tuple[Any, Any]:
        """``up`` and the projection, by their dictionary: in decoding, ``nn.Module``'s own way to an attribute counts."""
        return self._modules["up"], (self._owner[0] if self._owner else self)._modules["down"]

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[…, d_in]`` to ``[…, d_out]``."""
        up, down = self._factors()
        result: Tensor
        if not calls_nothing_else(down, up):
            result = up(down(x))
            return result
        weight, bias = up._weights()
        if down.readers == 1 and is_one(x, self.in_features, weight):
            return torch.addmv(bias, weight, down.of_vector(x.view(-1))).view(*x.shape[:-1], self.out_features)
        result = product(down.forward(x), weight, bias)
        return result

    @property
    def weight(self) -> Tensor:
        """The dense ``up · down``, [d_out, d_in], computed when asked for."""
        assert self.up is not None  # noqa: S101
        return self.up.weight @ self.projection.matrix

    @property
    def bias(self) -> Tensor:
        """The bias of the layer."""
        assert self.up is not None  # noqa: S101
        return self.up.bias

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        shared = ", shared" if self._owner else ""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}{shared}"


class PivotedLinear(LowRankLinear):
    """A low-rank layer that keeps some of its output rows as they are and makes the others of them (PIFA, arXiv:2501.19090).

    The kept rows of all layers of a unit lie in one projection ``down`` with a bias; ``start:stop`` are this layer's own.
    ``up`` makes the other rows: ``up(down(x))``, its bias less what ``down``'s bias already brings. ``order`` says where each
    output lies in (own kept rows, other rows).

    Args:
        d_in: features of the input.
        d_out: output features.
        rank: kept rows of the whole unit.
        own: ``(start, stop)`` of this layer's kept rows among them.
        dtype: of the weights.
    """

    order: Tensor

    def __init__(
        self, d_in: int, d_out: int, rank: int, *, own: tuple[int, int] = (0, 0), dtype: torch.dtype | None = None
    ) -> None:
        self.start, self.stop = own
        self._weights_dtype = dtype or torch.get_default_dtype()
        super().__init__(d_in, d_out, rank, dtype=dtype)
        self.register_buffer("order", torch.arange(d_out, dtype=torch.int32))

    def _make_up(self, dtype: torch.dtype | None) -> nn.Linear | None:
        others = self.out_features - (self.stop - self.start)
        return FactorLinear(self.rank, others, bias=True, dtype=dtype) if others else None

    def make_down(self, readers: int) -> None:
        """Hold the kept rows, for itself and for the other readers."""
        self.down = PivotRows(self.in_features, self.rank, readers, bias=True, dtype=self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        return self._weights_dtype if self.up is None else self.up.weight.dtype

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[…, d_in]`` to ``[…, d_out]``."""
        up, down = self._factors()
        if up is not None and down.readers == 1 and calls_nothing_else(down, up):
            return self._without_calls(x, down, *up._weights()).view(*x.shape[:-1], self.out_features)
        kept = down(x)
        own = kept[:, self.start : self.stop]
        outputs = own if up is None else torch.cat((own, up(kept)), dim=1)
        return in_order(outputs, self.order).view(*x.shape[:-1], self.out_features)

    def _without_calls(self, x: Tensor, down: PivotRows, weight: Tensor, bias: Tensor) -> Tensor:
        """Of one token and of many, both products are written where their outputs lie before these are put in order.

        For a few tokens, a product with gaps between the rows of its result is slower than putting two results together.
        """
        if is_one(x, self.in_features, weight):
            vector = x.new_empty(self.out_features)
            kept = down.write(x.reshape(-1), vector[: self.rank])
            torch.addmv(bias, weight, kept, out=vector[self.rank :])
            return vector.index_select(0, self.order)
        if not at_inference(x, weight) or x.numel() <= _FEW * self.in_features:
            kept = down.project(x)
            return torch.cat((kept, product(kept, weight, bias)), dim=1).index_select(1, self.order)
        outputs = x.new_empty(x.numel() // self.in_features, self.out_features)
        kept = down.write(x.reshape(-1, self.in_features), outputs[:, : self.rank])
        torch.addmm(bias, kept, weight.mT, out=outputs[:, self.rank :])
        return outputs.index_select(1, self.order)

    @property
    def weight(self) -> Tensor:
        """The dense weight, [d_out, d_in], computed when asked for."""
        rows = self.projection.weight
        parts = [rows[self.start : self.stop]] + ([] if self.up is None else [self.up.weight @ rows])
        return torch.cat(parts)[self.order]

    @property
    def bias(self) -> Tensor:
        """The bias of the layer, in the order of its outputs."""
        kept = self.projection.bias
        parts = [kept[self.start : self.stop]] + ([] if self.up is None else [self.up.bias + self.up.weight @ kept])
        return torch.cat(parts)[self.order]


_OWN = frozenset({FactorLinear, SharedProjection, PivotColumns, PivotRows})


def link_group(layers: Sequence[LowRankLinear]) -> None:
    """Give the first layer the projection and let the others read it there."""
    first, *others = layers
    first.make_down(len(layers))
    for layer in others:
        layer._owner = (first,)
