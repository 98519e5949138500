"""Activations rounded to 8 bits token by token, with smoothing and rotation on the way."""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, N803, N806, SIM108 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def eight_bits(values, FLOAT: tl.constexpr):
    """Round scaled numbers to the nearest of 8 bits, a tie to the even one. Integers must lie in -127..127 already."""
    if FLOAT:
        codes = tl.minimum(tl.maximum(values, -448.0), 448.0).to(tl.float8e4nv)
    else:
        # 1.5 * 2**23 leaves no bits for fractions; the last byte of the sum is the integer.
        codes = (values + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    return codes


@triton.jit
def scale_of(largest, LARGEST: tl.constexpr):
    """The scale that makes the largest magnitude the greatest code; 1 for zeros."""
    return tl.where(largest > 0, largest / LARGEST, 1.0)


@triton.jit
def smoothed(x, smooth, rows, columns, inside):
    """Part of the input, divided channel by channel, in its own type."""
    found = tl.load(x + rows + columns, mask=inside, other=0)
    if smooth is not None:
        by = tl.load(smooth + columns, mask=inside, other=1).to(found.dtype).to(tl.float32)
        found = (found.to(tl.float32) / by).to(found.dtype)
    return found


@triton.jit
def turned_by_four(values, SIZE: tl.constexpr, INNER: tl.constexpr):
    """The regular Hadamard matrix of order 4 on channels INNER apart: of a, b, c, d the first is (a + b + c - d) / 2.

    Half the sum of the own pair, and in the other pair what the number in the own place exceeds half of its sum by:
    two sums of two, each an exchange between threads at most.
    """
    parts = tl.reshape(values, [SIZE // (4 * INNER), 2, 2, INNER])
    pairs = tl.sum(parts, 2, keep_dims=True)
    excess = parts - 0.5 * pairs
    return tl.reshape(tl.sum(excess, 1, keep_dims=True) + (pairs - parts), [SIZE])


@triton.jit
def turned_by_two(values, SIZE: tl.constexpr):
    """The Hadamard matrix of order 2 on neighbouring channels."""
    even, odd = tl.split(tl.reshape(values, [SIZE // 2, 2]))
    return tl.reshape(tl.join(even + odd, even - odd), [SIZE]) * 0.7071067811865476


@triton.jit
def rotated(values, SIZE: tl.constexpr, ORDER: tl.constexpr):
    """`hadamard.rotate` of a row in groups of 2**ORDER channels, in float32."""
    TWO: tl.constexpr = ORDER % 2
    if TWO:
        values = turned_by_two(values, SIZE)
    for stage in tl.static_range(ORDER // 2):
        values = turned_by_four(values, SIZE, 1 << (TWO + 2 * stage))
    return values


@triton.jit
def round_rows(
    x, smooth, given, codes, scales, K, FLOAT: tl.constexpr, LARGEST: tl.constexpr, ORDER: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """A token for each program, which reads it once: codes [tokens, K] and scales [tokens]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < K
    # Groups that are rotated do not cross K, so what lies beyond stays zero.
    values = rotated(smoothed(x, smooth, token * K, columns, inside).to(tl.float32), WIDTH, ORDER)
    if given is None:
        scale = scale_of(tl.max(tl.abs(values), 0), LARGEST)
    else:
        scale = tl.load(given)
    tl.store(codes + token * K + columns, eight_bits(values / scale, FLOAT), mask=inside)
    tl.store(scales + token, scale)
