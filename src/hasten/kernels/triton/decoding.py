"""Codes of a weight to numbers inside of a kernel: packed planes, tables, and scales that are codes themselves."""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, N803, N806 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def plane(rows, start, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH codes from column `start` of one plane, uint8 [rows, WIDTH]; `rows` points to the plane in each row."""
    packed = tl.load(rows + start * BITS // 8 + tl.arange(0, WIDTH * BITS // 8)[None, :])
    if BITS == 4:
        found = tl.interleave(packed & 15, packed >> 4)
    elif BITS == 2:
        even = tl.interleave(packed & 3, packed >> 4 & 3)
        found = tl.interleave(even, tl.interleave(packed >> 2 & 3, packed >> 6))
    elif BITS == 1:
        first = tl.interleave(packed & 1, packed >> 4 & 1)
        third = tl.interleave(packed >> 2 & 1, packed >> 6 & 1)
        second = tl.interleave(packed >> 1 & 1, packed >> 5 & 1)
        fourth = tl.interleave(packed >> 3 & 1, packed >> 7)
        found = tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
    else:
        found = packed
    return found


@triton.jit
def stored(codes, n, k, K, BITS: tl.constexpr, WIDTH: tl.constexpr):
    """Codes as they are stored, [rows, WIDTH], of the rows `n` from column `k` on."""
    rows = codes + (n.to(tl.int64) * (K * BITS // 8))[:, None]
    FIRST: tl.constexpr = 8 if BITS == 8 else (4 if BITS >= 4 else (2 if BITS >= 2 else 1))
    found = plane(rows, k, FIRST, WIDTH)
    if BITS == 6 or BITS == 7:
        found = found | (plane(rows + K // 2, k, 2, WIDTH) << 4)
    if BITS == 3 or BITS == 5 or BITS == 7:
        found = found | (plane(rows + K * (BITS - 1) // 8, k, 1, WIDTH) << (BITS - 1))
    return found


@triton.jit
def factors(values, coarse, table, offset, n, k, row, size, coarse_row, coarse_size):
    """Scales of the rows `n` at the columns `k`, float32 [rows, columns]; `size` columns share one."""
    found = tl.load(values + n[:, None] * row + k[None, :] // size)
    found = found.to(tl.float32) if table is None else tl.load(table + found.to(tl.int32))
    if coarse is not None:
        larger = tl.load(coarse + n[:, None] * coarse_row + k[None, :] // coarse_size)
        found = found * larger.to(tl.float32)
    if offset is not None:
        found = found + tl.load(offset)
    return found


@triton.jit
def widen(values, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """[rows, COUNT] by group to [rows, WIDTH] by column; a single group stays [rows, 1]."""
    if COUNT > 1:
        ROWS: tl.constexpr = values.shape[0]
        repeated = tl.broadcast_to(values[:, :, None], (ROWS, COUNT, WIDTH // COUNT))
        found = tl.reshape(repeated, (ROWS, WIDTH))
    else:
        found = values
    return found


@triton.jit
def numbers(
    codes, table, scale, scale_coarse, scale_table, scale_offset,
    minimum, minimum_coarse, minimum_table, minimum_offset, zero, n, k, K,
    scale_row, scale_size, scale_coarse_row, scale_coarse_size,
    minimum_row, minimum_size, minimum_coarse_row, minimum_coarse_size, zero_row, zero_size,
    BITS: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Values of the weight, float32 [rows, WIDTH], in the order of operations of `QuantizedWeight.dequantize`.

    No scale, minimum or zero point changes inside of UNIT columns.
    """
    COUNT: tl.constexpr = 1 if UNIT >= WIDTH else WIDTH // UNIT
    places = k + tl.arange(0, COUNT) * UNIT
    found = stored(codes, n, k, K, BITS, WIDTH)
    if table is not None:
        found = tl.load(table + found.to(tl.int32))
    elif SHIFT > 0:
        found = (found.to(tl.int16) - SHIFT).to(tl.float32)
    else:
        found = found.to(tl.float32)
    if zero is not None:
        start = tl.load(zero + n[:, None] * zero_row + places[None, :] // zero_size)
        found = found - widen(start.to(tl.float32), COUNT, WIDTH)
    by = factors(scale, scale_coarse, scale_table, scale_offset, n, places,
                 scale_row, scale_size, scale_coarse_row, scale_coarse_size)  # fmt: skip
    found = found * widen(by, COUNT, WIDTH)
    if minimum is not None:
        less = factors(minimum, minimum_coarse, minimum_table, minimum_offset, n, places,
                       minimum_row, minimum_size, minimum_coarse_row, minimum_coarse_size)  # fmt: skip
        found = found - widen(less, COUNT, WIDTH)
    return found
