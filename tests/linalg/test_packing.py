"""Bit planes: bit-exact for every number of bits and any count."""

import pytest
import torch

from fasc.linalg.packing import pack, packed_size, unpack


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 9, 576])
def test_what_is_packed_comes_out_bit_for_bit_in_as_many_bytes_as_said(bits, count):
    codes = torch.randint(2**bits, (5, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    packed = pack(codes, bits)
    assert packed.shape == (5, packed_size(count, bits))
    assert torch.equal(unpack(packed, bits, count), codes)


def test_eight_codes_of_three_bits_are_three_planes():
    codes = torch.tensor([1, 2, 4, 0, 7, 0, 0, 3], dtype=torch.uint8)
    lowest, middle, highest = 0b10010001, 0b10010010, 0b00010100
    assert pack(codes, 3).tolist() == [lowest, middle, highest]
