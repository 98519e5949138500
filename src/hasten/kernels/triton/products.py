"""Products in Triton: codes widened on the way, 8-bit rows times 8-bit rows, and 8-bit rows times groups of codes.

Each ends with the scales of tokens, the bias and the second half of a side branch, and writes the output once.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, N803, SIM300 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

import triton
import triton.language as tl

from hasten.kernels.triton.decoding import factors, numbers, stored


@triton.jit
def tile(M, N, BM: tl.constexpr, BN: tl.constexpr):
    """Rows and columns of a program's tile; eight tiles of rows share columns, so that these stay in the L2 cache."""
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = tl.program_id(0) // (8 * across)
    height = tl.minimum(down - band * 8, 8)
    place = tl.program_id(0) % (8 * across)
    m = (band * 8 + place % height) * BM + tl.arange(0, BM)
    return m, place // height * BN + tl.arange(0, BN)


@triton.jit
def within(places, SIZE):
    """The last place instead of those beyond it, whose results are not written: loads need no mask."""
    return tl.minimum(places, SIZE - 1)


@triton.jit
def finish(found, token_scale, bias, side, up, out, m, n, M, N, ranks: tl.constexpr, RANKS: tl.constexpr):
    """Scales of tokens, bias and side branch, [tokens, ranks] times [outputs, ranks]; then the output is written."""
    if token_scale is not None:
        found = found * tl.load(token_scale + m, mask=m < M, other=0)[:, None]
    if bias is not None:
        found = found + tl.load(bias + n, mask=n < N, other=0).to(tl.float32)[None, :]
    if side is not None:
        for start in range(0, ranks, RANKS):
            rank = start + tl.arange(0, RANKS)
            there, here = (rank < ranks)[None, :], (rank < ranks)[:, None]
            left = tl.load(side + m[:, None] * ranks + rank[None, :], mask=(m < M)[:, None] & there, other=0)
            right = tl.load(up + n[None, :] * ranks + rank[:, None], mask=(n < N)[None, :] & here, other=0)
            found = tl.dot(left, right, found, input_precision="ieee")
    places = out + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(places, found.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def widen_weight(
    codes, table, scale, scale_coarse, scale_table, scale_offset,
    minimum, minimum_coarse, minimum_table, minimum_offset, zero, out, N, K,
    scale_row, scale_size, scale_coarse_row, scale_coarse_size,
    minimum_row, minimum_size, minimum_coarse_row, minimum_coarse_size, zero_row, zero_size,
    BITS: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """All values of a weight, [N, K] in the type of `out`."""
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(1) * BK
    found = numbers(codes, table, scale, scale_coarse, scale_table, scale_offset,
                    minimum, minimum_coarse, minimum_table, minimum_offset, zero, within(n, N), k, K,
                    scale_row, scale_size, scale_coarse_row, scale_coarse_size,
                    minimum_row, minimum_size, minimum_coarse_row, minimum_coarse_size, zero_row, zero_size,
                    BITS, SHIFT, UNIT, BK)  # fmt: skip
    places = out + n.to(tl.int64)[:, None] * K + k + tl.arange(0, BK)[None, :]
    tl.store(places, found.to(out.dtype.element_ty), mask=(n < N)[:, None])


@triton.jit
def widening_product(
    x, token_scale, bias, side, up, out,
    codes, table, scale, scale_coarse, scale_table, scale_offset,
    minimum, minimum_coarse, minimum_table, minimum_offset, zero, M, N, K: tl.constexpr, ranks: tl.constexpr,
    scale_row, scale_size, scale_coarse_row, scale_coarse_size,
    minimum_row, minimum_size, minimum_coarse_row, minimum_coarse_size, zero_row, zero_size,
    BITS: tl.constexpr, SHIFT: tl.constexpr, UNIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Codes become numbers of the output's type on the way; 8-bit inputs do too, exactly, and are scaled later."""
    m, n = tile(M, N, BM, BN)
    kind: tl.constexpr = out.dtype.element_ty
    rows = x + within(m, M).to(tl.int64)[:, None] * K + tl.arange(0, BK)[None, :]
    found = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        left = tl.load(rows + k)
        right = numbers(codes, table, scale, scale_coarse, scale_table, scale_offset,
                        minimum, minimum_coarse, minimum_table, minimum_offset, zero, within(n, N), k, K,
                        scale_row, scale_size, scale_coarse_row, scale_coarse_size,
                        minimum_row, minimum_size, minimum_coarse_row, minimum_coarse_size, zero_row, zero_size,
                        BITS, SHIFT, UNIT, BK)  # fmt: skip
        found = tl.dot(left.to(kind), tl.trans(right.to(kind)), found, input_precision="ieee")
    finish(found, token_scale, bias, side, up, out, m, n, M, N, ranks, RANKS)


@triton.jit
def rows_product(
    x, token_scale, bias, side, up, out, codes, scale, M, N, K: tl.constexpr, ranks: tl.constexpr, scale_row,
    SUM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """8 bits times 8 bits, integers or floats; a scale for each token and each output."""
    m, n = tile(M, N, BM, BN)
    inner = tl.arange(0, BK)
    left = x + within(m, M).to(tl.int64)[:, None] * K + inner[None, :]
    right = codes + within(n, N).to(tl.int64)[None, :] * K + inner[:, None]
    found = tl.zeros((BM, BN), SUM)
    for k in range(0, K, BK):
        found = tl.dot(tl.load(left + k), tl.load(right + k), found, out_dtype=SUM)
    by = tl.load(scale + within(n, N) * scale_row).to(tl.float32)
    finish(found.to(tl.float32) * by[None, :], token_scale, bias, side, up, out, m, n, M, N, ranks, RANKS)


@triton.jit
def grouped_product(
    x, token_scale, bias, side, up, out,
    codes, table, scale, scale_coarse, scale_table, scale_offset,
    minimum, minimum_coarse, minimum_table, minimum_offset, zero, M, N, K: tl.constexpr, ranks: tl.constexpr,
    scale_row, scale_size, scale_coarse_row, scale_coarse_size,
    minimum_row, minimum_size, minimum_coarse_row, minimum_coarse_size, zero_row, zero_size,
    BITS: tl.constexpr, SHIFT: tl.constexpr, SUM: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """8-bit tokens times groups of codes that are whole numbers: exact sums by group, which are scaled and added.

    BK columns never cross a group. Zero points are taken off the codes, minimums off the sums.
    """
    m, n = tile(M, N, BM, BN)
    rows = x + within(m, M).to(tl.int64)[:, None] * K + tl.arange(0, BK)[None, :]
    found = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        place = k + tl.arange(0, 1)
        rest = within(n, N)
        left = tl.load(rows + k)
        right = stored(codes, rest, k, K, BITS, BK)
        if SUM == tl.int32:
            right = right.to(tl.int16) - SHIFT
            if zero is not None:
                places = zero + rest[:, None] * zero_row + place[None, :] // zero_size
                right = right - tl.load(places).to(tl.int16)
            right = right.to(tl.int8)
        by = factors(scale, scale_coarse, scale_table, scale_offset, rest, place,
                     scale_row, scale_size, scale_coarse_row, scale_coarse_size)  # fmt: skip
        sums = tl.dot(left, tl.trans(right), out_dtype=SUM).to(tl.float32)
        found += sums * tl.trans(by)
        if minimum is not None:
            less = factors(minimum, minimum_coarse, minimum_table, minimum_offset, rest, place,
                           minimum_row, minimum_size, minimum_coarse_row, minimum_coarse_size)  # fmt: skip
            found -= tl.sum(left.to(tl.float32), 1)[:, None] * tl.trans(less)
    finish(found, token_scale, bias, side, up, out, m, n, M, N, ranks, RANKS)
