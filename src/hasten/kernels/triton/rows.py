"""Activations rounded to 8 bits token by token, with smoothing and rotation on the way."""

# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, N803, SIM108 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def eight_bits(values, scale, FLOAT: tl.constexpr):
    """Divide by the scale and round to the nearest number of 8 bits; a tie goes to the even one."""
    found = values / scale
    if FLOAT:
        codes = tl.minimum(tl.maximum(found, -448.0), 448.0).to(tl.float8e4nv)
    else:
        # Adding 1.5 * 2**23 leaves no bits for fractions: rounds to nearest even without a library.
        found = (found + 12582912.0) - 12582912.0
        codes = tl.minimum(tl.maximum(found, -127.0), 127.0).to(tl.int8)
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
def round_rows(x, smooth, given, codes, scales, K, FLOAT: tl.constexpr, LARGEST: tl.constexpr, WIDTH: tl.constexpr):
    """A token for each program, which reads it once: codes [tokens, K] and scales [tokens]."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < K
    values = smoothed(x, smooth, token * K, columns, inside).to(tl.float32)
    if given is None:
        scale = scale_of(tl.max(tl.abs(values), 0), LARGEST)
    else:
        scale = tl.load(given)
    tl.store(codes + token * K + columns, eight_bits(values, scale, FLOAT), mask=inside)
    tl.store(scales + token, scale)


@triton.jit
def rotated(x, smooth, matrix, rows, start, inside, GROUP: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr):
    """One group of channels after smoothing and rotation, float32 [TOKENS, GROUP]."""
    into = tl.arange(0, GROUP)[None, :]
    found = tl.zeros((TOKENS, GROUP), tl.float32)
    for part in range(0, GROUP, PART):
        inner = part + tl.arange(0, PART)
        values = smoothed(x, smooth, rows, (start + inner)[None, :], inside)
        turn = tl.load(matrix + inner[:, None] * GROUP + into)
        found = tl.dot(values, turn, found, input_precision="ieee")
    return found


@triton.jit
def rotate_round_rows(
    x, smooth, matrix, given, codes, scales, M, K: tl.constexpr, FLOAT: tl.constexpr, LARGEST: tl.constexpr,
    GROUP: tl.constexpr, PART: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """The same for TOKENS tokens a program, each group of channels multiplied by `matrix`, [GROUP, GROUP], before.

    Rotates twice, once for the largest magnitude and once to round: cheaper than to keep whole tokens in float32.
    """
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    inside = (tokens < M)[:, None]
    rows = tokens.to(tl.int64)[:, None] * K
    if given is None:
        largest = tl.zeros((TOKENS,), tl.float32)
        for start in range(0, K, GROUP):
            found = rotated(x, smooth, matrix, rows, start, inside, GROUP, PART, TOKENS)
            largest = tl.maximum(largest, tl.max(tl.abs(found), 1))
        scale = scale_of(largest, LARGEST)
    else:
        scale = tl.load(given) + tl.zeros((TOKENS,), tl.float32)
    for start in range(0, K, GROUP):
        found = rotated(x, smooth, matrix, rows, start, inside, GROUP, PART, TOKENS)
        places = codes + rows + start + tl.arange(0, GROUP)[None, :]
        tl.store(places, eight_bits(found, scale[:, None], FLOAT), mask=inside)
    tl.store(scales + tokens, scale, mask=tokens < M)
