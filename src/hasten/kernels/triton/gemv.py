"""Products of up to four tokens in Triton: each row of the weight is read once, in pieces of 16 bytes a thread.

Only the reading of the weight takes time here, so there are no tensor cores, and no layouts that would have to be
changed on the way: a thread multiplies the 16 or 32 codes of its piece, adds them up, and scales the sum. Tensors are
[columns, rows], since Triton lays those loads along the first dimension of which it knows no order, such as scales.
"""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, N803, N806 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

import triton
import triton.language as tl

from hasten.kernels.triton.decoding import factors, unscaled
from hasten.kernels.triton.products import within


@triton.jit
def pieces(values, COUNT: tl.constexpr):
    """Sums of COUNT pieces of each row: [COUNT, rows]."""
    WIDTH: tl.constexpr = values.shape[0] // COUNT
    ROWS: tl.constexpr = values.shape[1]
    return tl.sum(tl.reshape(values, (COUNT, WIDTH, ROWS)), 1)


@triton.jit
def inputs(x, places, KIND: tl.constexpr):
    """Two neighbouring inputs of 16 bits at once, which a byte of two 4-bit codes is for: float32, float32."""
    words = tl.load(x + places)
    low = (words & 0xFFFF).to(tl.int16).to(KIND, bitcast=True)
    high = (words >> 16).to(tl.int16).to(KIND, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def multiplied(low, high, by, less, x, token, k, K, KIND: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """The part of a product that BK columns give to a token, [COUNT, rows]: a sum for each piece."""
    BYTES: tl.constexpr = low.shape[0]
    ROWS: tl.constexpr = low.shape[1]
    # As many as the codes, though rows share them: so both are loaded in the same layout.
    places = tl.arange(0, BYTES)[:, None] + tl.zeros((1, ROWS), tl.int32)
    if BITS == 4:
        even, odd = inputs(x, token * (K // 2) + k // 2 + places, KIND)
        found = (pieces(low * even, COUNT) + pieces(high * odd, COUNT)) * by
        if less is not None:
            found = found - pieces(even + odd, COUNT) * less
    else:
        values = tl.load(x + token * K + k + places).to(tl.float32)
        found = pieces(low * values, COUNT) * by
        if less is not None:
            found = found - pieces(values, COUNT) * less
    return found


@triton.jit
def write(sums, token, bias, side, up, out, n, M, N, ranks: tl.constexpr, RANKS: tl.constexpr):
    """One token's outputs: pieces added up, bias and side branch."""
    found, rest = tl.sum(sums, 0), within(n, N)
    if bias is not None:
        found = found + tl.load(bias + rest).to(tl.float32)
    if side is not None:
        for start in range(0, ranks, RANKS):
            rank = start + tl.arange(0, RANKS)
            left = tl.load(side + within(token, M) * ranks + rank, mask=rank < ranks, other=0).to(tl.float32)
            places = up + rest[:, None] * ranks + rank[None, :]
            right = tl.load(places, mask=(rank < ranks)[None, :], other=0).to(tl.float32)
            found = found + tl.sum(left[None, :] * right, 1)
    tl.store(out + token * N + n, found.to(out.dtype.element_ty), mask=(n < N) & (token < M))


@triton.jit
def few_tokens_product(
    x, bias, side, up, out,
    codes, table, scale, scale_coarse, scale_table, scale_offset,
    minimum, minimum_coarse, minimum_table, minimum_offset, zero, M, N, K: tl.constexpr, ranks: tl.constexpr,
    scale_row, scale_size: tl.constexpr, scale_coarse_row, scale_coarse_size: tl.constexpr,
    minimum_row, minimum_size: tl.constexpr, minimum_coarse_row, minimum_coarse_size: tl.constexpr,
    zero_row, zero_size: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr, PIECE: tl.constexpr,
    TOKENS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UNROLL: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """BN outputs of 1, 2 or 4 tokens. `x` is [tokens, K], with 4-bit codes seen as [tokens, K / 2] words of 32 bits.

    PIECE codes share scale, minimum and zero point; the latter two are taken off the sums.
    """
    COUNT: tl.constexpr = BK // PIECE
    KIND: tl.constexpr = out.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    rest = within(n, N)[None, :]
    rows = codes + rest.to(tl.int64) * (K * BITS // 8) + tl.arange(0, BK * BITS // 8)[:, None]
    first = tl.zeros((COUNT, BN), tl.float32)
    second, third, fourth = first, first, first
    for start in range(0, K, BK * UNROLL):
        for part in tl.static_range(UNROLL):
            k = start + part * BK
            places = (k + tl.arange(0, COUNT) * PIECE)[:, None]
            low, high = unscaled(tl.load(rows + k * BITS // 8), table, BITS, SHIFT)
            by = factors(scale, scale_coarse, scale_table, scale_offset, rest, places,
                         scale_row, scale_size, scale_coarse_row, scale_coarse_size)  # fmt: skip
            less = None
            if minimum is not None:
                less = factors(minimum, minimum_coarse, minimum_table, minimum_offset, rest, places,
                               minimum_row, minimum_size, minimum_coarse_row, minimum_coarse_size)  # fmt: skip
            if zero is not None:
                start_code = tl.load(zero + rest * zero_row + places // zero_size)
                less = start_code.to(tl.float32) * by if less is None else less + start_code.to(tl.float32) * by
            first += multiplied(low, high, by, less, x, 0, k, K, KIND, BITS, COUNT)
            if TOKENS > 1:
                second += multiplied(low, high, by, less, x, within(1, M), k, K, KIND, BITS, COUNT)
            if TOKENS > 2:
                third += multiplied(low, high, by, less, x, within(2, M), k, K, KIND, BITS, COUNT)
                fourth += multiplied(low, high, by, less, x, within(3, M), k, K, KIND, BITS, COUNT)
    write(first, 0, bias, side, up, out, n, M, N, ranks, RANKS)
    if TOKENS > 1:
        write(second, 1, bias, side, up, out, n, M, N, ranks, RANKS)
    if TOKENS > 2:
        write(third, 2, bias, side, up, out, n, M, N, ranks, RANKS)
        write(fourth, 3, bias, side, up, out, n, M, N, ranks, RANKS)
