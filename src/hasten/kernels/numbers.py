"""What a code stands for: integers with and without sign, 8-bit floats, and entries of a table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

Kind = Literal["integer", "float", "table"]


@dataclass(frozen=True)
class Number:
    """How the codes of a weight read before they are scaled."""

    name: str
    bits: int
    kind: Kind
    shift: int = 0
    """What is subtracted from a stored integer code: signed numbers of fewer than 8 bits are stored shifted."""
    dtype: torch.dtype = torch.uint8
    """Type of the stored tensor; uint8 unless the code fills a byte of its own type."""

    @property
    def packed(self) -> bool:
        """Are several codes stored in a byte, or one in several planes?"""
        return self.bits < 8

    @property
    def least(self) -> int:
        """The smallest integer."""
        return -(1 << self.bits - 1) if self.shift or self.dtype == torch.int8 else 0

    @property
    def greatest(self) -> int:
        """The greatest integer."""
        return self.least + (1 << self.bits) - 1


def _all() -> list[Number]:
    signed = [Number(f"int{bits}", bits, "integer", 1 << bits - 1) for bits in range(1, 8)]
    unsigned = [Number(f"uint{bits}", bits, "integer") for bits in range(1, 9)]
    tables = [Number(f"table{bits}", bits, "table") for bits in range(1, 9)]
    floats = [Number(str(t).removeprefix("torch."), 8, "float", 0, t) for t in (torch.float8_e4m3fn, torch.float8_e5m2)]
    return [*signed, Number("int8", 8, "integer", 0, torch.int8), *unsigned, *tables, *floats]


NUMBERS = {number.name: number for number in _all()}
"""All kinds of codes by name: int1 to int8, uint1 to uint8, table1 to table8, float8_e4m3fn and float8_e5m2."""


def decode(codes: torch.Tensor, number: Number, columns: int, table: torch.Tensor | None) -> torch.Tensor:
    """The unscaled values of stored codes, float32 [rows, columns]."""
    from hasten.kernels.packing import unpack

    if number.bits == 4 and codes.device.type == "cpu":
        return _by_bytes(codes, number, table).reshape(codes.shape[0], columns)
    plain = unpack(codes, number.bits, columns) if number.packed else codes
    if number.kind == "table":
        assert table is not None
        return table.float()[plain.int()]
    # Not `plain - shift` in float: subtracting in integers is exact and keeps -0 out.
    return plain.float() if not number.shift else (plain.to(torch.int16) - number.shift).float()


def _by_bytes(codes: torch.Tensor, number: Number, table: torch.Tensor | None) -> torch.Tensor:
    """The values of packed 4-bit codes, flat: a byte picks both of its values at once, which is four times as fast."""
    values = torch.arange(16.0) - number.shift if table is None else table.float()
    pairs = torch.stack([values.repeat(16), values.repeat_interleave(16)], 1).view(torch.float64).reshape(-1)
    return pairs.index_select(0, codes.reshape(-1).int()).view(torch.float32)
