"""4-bit floats in blocks: the numbers of NVFP4 and MXFP4 (e2m1), their scales, and NVIDIA's order of block scales.

Sources: OCP Microscaling Formats 1.0; https://docs.nvidia.com/cuda/cublas (block scaling factors layout).
"""

from __future__ import annotations

import torch

from hasten.kernels.numbers import NUMBERS
from hasten.kernels.packing import pack
from hasten.kernels.rounding import grouped, positive
from hasten.kernels.weight import QuantizedWeight, Scales, spread

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""What the codes stand for."""
NVFP4_BLOCK = 16
MXFP8_BLOCK = 32
_BETWEEN = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
_ROWS, _COLUMNS = 128, 4
"""Sides of a tile of block scales."""


def e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest codes, uint8; a tie goes to the even code, and what is too large to the largest."""
    size = values.abs()
    codes = torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
    for index, border in enumerate(_BETWEEN):
        codes += (size >= border) if index % 2 else (size > border)
    return codes | (values < 0).to(torch.uint8) << 3


def quantize_nvfp4(weight: torch.Tensor) -> QuantizedWeight:
    """Round to e2m1 in blocks of 16 with e4m3 scales under one float32 scale of the tensor, amax / (448 * 6)."""
    matrix = weight.detach().reshape(weight.shape[0], -1).float()
    whole = positive(matrix.abs().amax() / (448 * 6)).reshape(1, 1)
    blocks = (grouped(matrix, NVFP4_BLOCK).abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    scale = Scales(blocks, whole)
    codes = e2m1_codes(matrix / spread(positive(scale.values()), matrix.shape[1]))
    number = NUMBERS["table4"]
    return QuantizedWeight(tuple(weight.shape), number, matrix.shape[1], pack(codes, 4), scale, table=E2M1.clone())


def quantize_mxfp8(weight: torch.Tensor) -> QuantizedWeight:
    """Round to e4m3 in blocks of 32 with scales that are powers of two, the smallest with which nothing overflows."""
    matrix = weight.detach().reshape(weight.shape[0], -1).float()
    part, exponent = torch.frexp(positive(grouped(matrix, MXFP8_BLOCK).abs().amax(-1) / 448))
    power = (exponent - (part == 0.5).int() + 127).clamp(0, 254).to(torch.uint8).view(torch.float8_e8m0fnu)
    codes = (matrix / spread(power.float(), matrix.shape[1])).to(torch.float8_e4m3fn)
    number = NUMBERS["float8_e4m3fn"]
    return QuantizedWeight(tuple(weight.shape), number, matrix.shape[1], codes, Scales(power))


def is_e2m1(weight: QuantizedWeight) -> bool:
    """Are its codes 4-bit floats (the sign of zero counts)?"""
    table = weight.table
    return weight.number.name == "table4" and table is not None and torch.equal(_bits(table.cpu()), _bits(E2M1))


def swap_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Exchange the halves of each byte, uint8."""
    return codes << 4 | codes >> 4


def tiled(scales: torch.Tensor) -> torch.Tensor:
    """Block scales, [rows, blocks], in the order that tensor cores of Blackwell read, padded to tiles of 128 x 4.

    Row r, column c of a tile lies at byte 16 (r mod 32) + 4 (r div 32) + c of its 512; tiles follow row by row. The
    result keeps the shape of the padded matrix.
    """
    raw = scales.view(torch.uint8)
    rows, columns = _up(raw.shape[0], _ROWS), _up(raw.shape[1], _COLUMNS)
    padded = raw.new_zeros(rows, columns)
    padded[: raw.shape[0], : raw.shape[1]] = raw
    tiles = padded.reshape(rows // _ROWS, 4, 32, columns // _COLUMNS, _COLUMNS).permute(0, 3, 2, 1, 4)
    return tiles.reshape(rows, columns).view(scales.dtype)


def untiled(scales: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The inverse of `tiled`: scales [rows, columns]."""
    high, wide = _up(rows, _ROWS), _up(columns, _COLUMNS)
    tiles = scales.view(torch.uint8).reshape(high // _ROWS, wide // _COLUMNS, 32, 4, _COLUMNS)
    plain = tiles.permute(0, 3, 2, 1, 4).reshape(high, wide)
    return plain[:rows, :columns].contiguous().view(scales.dtype)


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int32)
