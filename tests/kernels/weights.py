"""Small quantized weights of every kind that kernels have to read."""

from __future__ import annotations

import torch

from hasten.kernels.numbers import NUMBERS
from hasten.kernels.packing import pack
from hasten.kernels.rounding import quantize_float8, quantize_integer, quantize_table
from hasten.kernels.weight import QuantizedWeight, Scales

_ROWS, _COLUMNS = 24, 64


def matrix(rows: int = _ROWS, columns: int = _COLUMNS) -> torch.Tensor:
    """The same random numbers at every call."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def super_blocks(bits: int, group: int, minimum: bool) -> QuantizedWeight:
    """As in GGUF: integer scales (and minimums) of groups with a floating-point scale for several of them."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (_ROWS, _COLUMNS), generator=generator, dtype=torch.uint8)
    fine = torch.randint(1, 63, (_ROWS, _COLUMNS // group), generator=generator, dtype=torch.uint8)
    coarse = (torch.rand(_ROWS, 1, generator=generator) / 100).half()
    less = Scales(fine.flip(0), coarse.flip(0)) if minimum else None
    return QuantizedWeight(
        (_ROWS, _COLUMNS), NUMBERS[f"uint{bits}"], _COLUMNS, pack(codes, bits), Scales(fine, coarse), less
    )


def double_quantized(group: int) -> QuantizedWeight:
    """As in bitsandbytes: 4-bit codes of a table; scales are codes of another, with a coarse scale and an offset."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 16, (_ROWS, _COLUMNS), generator=generator, dtype=torch.uint8)
    fine = torch.randint(0, 256, (_ROWS, _COLUMNS // group), generator=generator, dtype=torch.uint8)
    scale = Scales(fine, torch.rand(_ROWS, 1), torch.linspace(-1, 1, 256), torch.tensor(1.5))
    table = torch.linspace(-1, 1, 16) ** 3
    return QuantizedWeight((_ROWS, _COLUMNS), NUMBERS["table4"], _COLUMNS, pack(codes, 4), scale, table=table)


def made(name: str) -> QuantizedWeight:
    """A weight, [24, 64] unless its name says odd, by its name in WEIGHTS."""
    kind, _, rest = name.partition(" ")
    if kind in ("k4", "k3", "nf4"):
        return {"k4": super_blocks(4, 32, True), "k3": super_blocks(3, 16, True), "nf4": double_quantized(16)}[kind]
    if kind == "odd":
        return quantize_integer(matrix(_ROWS, 72), 4, 24) if rest == "groups" else _other_grid()
    if kind == "float8":
        return quantize_float8(matrix(), block=rest)
    if kind == "table4":
        return quantize_table(matrix(), torch.linspace(-1, 1, 16), 4, 32)
    bits, group = int(kind[-1]), None if rest == "row" else int(rest[1:])
    return quantize_integer(matrix(), bits, group, symmetric=kind.startswith("int"), scales=torch.float16)


def _other_grid() -> QuantizedWeight:
    """Blocks that run on from row to row, as in bitsandbytes where the inputs are no multiple of them."""
    found = quantize_integer(matrix(48, 32), 4, 32)
    return QuantizedWeight((_ROWS, _COLUMNS), found.number, 32, found.codes, found.scale)


WEIGHTS = (
    *(f"{kind}{bits} g32" for kind in ("int", "uint") for bits in range(2, 9)),
    *("int4 g8", "uint4 g16", "int3 row", "int8 row", "k4", "k3", "nf4", "table4", "float8 row", "float8 tensor"),
    *("odd groups", "odd grid"),
)
"""Names of weights; `g` is followed by the size of a group."""
