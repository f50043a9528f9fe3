"""Matrices of few bits, as they lie on disk and in memory: packed codes, a scale and a zero for each group of inputs.

Exact and without a kernel of its own: the weight is made anew in every forward pass. It saves bytes, not time; engines that
multiply by few bits read an export.
"""

from collections.abc import Iterator
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from fasc.layouts.factors import LinearMap
from fasc.linalg.packing import pack, packed_size, unpack
from fasc.linalg.rounding import Grid, Rounded

SCALE_BYTES = 2
"""Of a scale, in float16 whatever the precision of the model."""


Count = TypeVar("Count", int, NDArray[np.int64])


def quantised_bytes(d_in: int, d_out: int, bits: Count, group: int) -> Count:
    """Bytes of a rounded matrix: codes, scales and zeros, all that :class:`QuantisedLinear` holds but its bias and one number.

    Args:
        d_in: inputs.
        d_out: outputs.
        bits: a number of bits, or an array of them.
        group: inputs that share a scale.
    """
    groups = -(-d_in // group)
    return d_out * packed_size(d_in, bits) + d_out * groups * SCALE_BYTES + packed_size(d_out * groups, bits)


class QuantisedLinear(nn.Module):
    """``x ↦ W x + b`` with ``W`` rounded.

    Scales are kept as the bits of float16 in int16, because loading or casting a model changes the type of every floating-point
    tensor.

    Args:
        d_in: features of the input.
        d_out: output features.
        bits: of a code.
        group: inputs that share a scale.
        bias: whether there is one, in the precision of the model.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    def __init__(self, d_in: int, d_out: int, bits: int, group: int, *, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.group = d_in, d_out, bits, group
        groups = -(-d_in // group)
        self.register_buffer("codes", torch.zeros(d_out, packed_size(d_in, bits), dtype=torch.uint8))
        self.register_buffer("scales", torch.zeros(d_out, groups, dtype=torch.int16))
        self.register_buffer("zeros", torch.zeros(packed_size(d_out * groups, bits), dtype=torch.uint8))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        # On disk `weight` is one number: a program that does not know this module looks for a matrix of that name, and stops. The
        # property of that name hides it, which is why it is not registered in the usual way.
        self._buffers["weight"] = torch.zeros(1)

    @staticmethod
    def state_of(rounded: Rounded) -> dict[str, Tensor]:
        """The tensors of a rounded weight, without a bias."""
        grid = rounded.grid
        return {
            "codes": pack(rounded.codes, grid.bits),
            "scales": grid.scales.half().view(torch.int16),
            "zeros": pack(grid.zeros.to(torch.uint8).flatten(), grid.bits),
            "weight": torch.zeros(1),
        }

    def rounded(self) -> Rounded:
        """Codes and grid."""
        scales = self.scales.view(torch.float16).float()
        zeros = unpack(self.zeros, self.bits, scales.numel()).view_as(scales).float()
        return Rounded(unpack(self.codes, self.bits, self.in_features), Grid(scales, zeros, self.bits, self.group))

    @property
    def weight(self) -> Tensor:
        """The matrix, [d_out, d_in], made anew; in the bias' precision, or float32. Half loaded, it is what is on disk."""
        on_disk: Tensor = self._buffers["weight"]  # type: ignore[assignment]
        if len({tensor.device.type for tensor in self.buffers()}) > 1:
            return on_disk
        return self.rounded().dense().to(torch.float32 if self.bias is None else self.bias.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Map […, d_in] to […, d_out]."""
        return F.linear(x, self.rounded().dense().to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}"


def quantised_like(module: nn.Module, shape: tuple[int, int], bits: int, group: int) -> QuantisedLinear:
    """An empty module of so many bits for the place of a linear one.

    Args:
        module: ``nn.Linear`` or another that holds a matrix and perhaps a bias.
        shape: outputs and inputs.
        bits: of a code.
        group: inputs that share a scale.
    """
    bias = getattr(module, "bias", None) is not None
    return QuantisedLinear(shape[1], shape[0], bits, group, bias=bias)


def linear_maps(module: nn.Module) -> Iterator[LinearMap]:
    """The matrices that a layer is stored in, in the order in which they are used; itself where it is dense."""
    maps = getattr(module, "linear_maps", None)
    if maps is None:
        yield LinearMap("")
    else:
        yield from maps()


class QuantisedEmbedding(nn.Module):
    """A table of few bits: rows are made from their codes when they are read.

    Args:
        tokens: rows.
        width: features of a row.
        bits: of a code.
        group: features that share a scale.
        scale: what the rows are multiplied by.
    """

    def __init__(self, tokens: int, width: int, bits: int, group: int, scale: float) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.scale = tokens, width, scale
        self.table = QuantisedLinear(width, tokens, bits, group, bias=False)
        # It says in which precision rows are given, because a model is cast as a whole; and see QuantisedLinear.
        self.register_buffer("weight", torch.zeros(1))

    weight: Tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """Rows of tokens, [… width]."""
        table, ids = self.table, tokens.flatten()
        scales = table.scales[ids].view(torch.float16).to(self.weight.dtype).repeat_interleave(table.group, 1)
        zeros = unpack(table.zeros, table.bits, table.scales.numel()).view_as(table.scales)[ids].repeat_interleave(table.group, 1)
        codes = unpack(table.codes[ids], table.bits, table.in_features)
        rows = scales[:, : table.in_features] * (codes.to(scales) - zeros[:, : table.in_features].to(scales))
        return (self.scale * rows).view(*tokens.shape, -1)

    def extra_repr(self) -> str:
        """One line for ``print(model)``."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class TiedHead(nn.Module):
    """Logits by the table of a quantised embedding, which it holds no copy of.

    Args:
        embedding: the module.
        bias: whether there is one.
    """

    def __init__(self, embedding: QuantisedEmbedding, *, bias: bool) -> None:
        super().__init__()
        self._of = (embedding,)  # in a tuple it is no submodule, and is copied with the model
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.bias = nn.Parameter(torch.empty(embedding.num_embeddings)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map […, width] to […, tokens]."""
        return F.linear(x, self._of[0].table.rounded().dense().to(x.dtype), self.bias)
