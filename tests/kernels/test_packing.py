"""Codes in bit planes."""

from __future__ import annotations

import pytest
import torch

from hasten.kernels.packing import PLANES, fits, pack, packed_columns, unpack


@pytest.mark.parametrize("bits", PLANES)
@pytest.mark.parametrize("rows", [1, 3])
def test_unpacking_gives_the_codes_back(bits: int, rows: int) -> None:
    codes = torch.randint(0, 1 << bits, (rows, 40), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, packed_columns(40, bits)) == (rows, 5 * bits)
    assert torch.equal(unpack(packed, bits, 40), codes)


def test_the_order_is_the_documented_one() -> None:
    codes = torch.tensor([[0b100001, 0b010010, 0b000011, 0b110100]], dtype=torch.uint8)
    # The low four bits two to a byte, then the high two four to a byte; each from the lowest bit up.
    assert pack(codes, 6).tolist() == [[0x21, 0x43, 0b11_00_01_10]]


def test_rows_that_fill_no_whole_bytes_are_refused() -> None:
    assert fits(8, 5)
    assert not fits(12, 5)
    assert fits(2, 4)
    with pytest.raises(ValueError, match="12 codes of 5 bits"):
        pack(torch.zeros(1, 12, dtype=torch.uint8), 5)
