"""Codes of few bits as bytes: every eight codes of ``b`` bits are ``b`` bytes, the first with the lowest bit of each, and so on.

Bit planes need no case for three or five bits, and lose nothing where the number of bits does not divide eight.
"""

from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor

Count = TypeVar("Count", int, NDArray[np.int64])


def packed_size(count: int, bits: Count) -> Count:
    """Bytes of so many codes."""
    return -(-count // 8) * bits


def pack(codes: UInt8[Tensor, "*rows n"], bits: int) -> UInt8[Tensor, "*rows bytes"]:
    """Codes below ``2^bits`` (uint8) as bytes; the last eight are filled up with zeros."""
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 8)).unflatten(-1, (-1, 8))
    places = torch.arange(8, dtype=torch.uint8, device=codes.device)
    planes = [(((filled >> plane) & 1) << places).sum(-1, dtype=torch.uint8) for plane in range(bits)]
    return torch.stack(planes, dim=-1).flatten(-2)


def unpack(packed: UInt8[Tensor, "*rows bytes"], bits: int, count: int) -> UInt8[Tensor, "*rows n"]:
    """Inverse of :func:`pack`: ``count`` codes, uint8."""
    planes = packed.unflatten(-1, (-1, bits))
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    codes = torch.zeros((*planes.shape[:-1], 8), dtype=torch.uint8, device=packed.device)
    for plane in range(bits):
        codes |= ((planes[..., plane, None] >> places) & 1) << plane
    return codes.flatten(-2)[..., :count]
