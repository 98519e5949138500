"""The kernel behind `kernels.rotary`: a program norms and rotates all heads of a token, where attention wants them."""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, ANN202, N803 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hasten.kernels.rotary import HeadNorm, Heads
from hasten.kernels.triton.tools import by_row, warps


@triton.jit
def _normed(values, weight, head, channel, inside, size, count, eps, ACROSS: tl.constexpr):
    """RMS norm of [heads, channels] by head, or of all heads together."""
    squares = tl.sum(values * values, 1, keep_dims=True)
    if ACROSS:
        squares = tl.sum(squares, 0, keep_dims=True) / count
    values = values * tl.rsqrt(squares / size + eps)
    if weight is not None:
        place = weight + channel[None, :] + (head[:, None] * size if ACROSS else 0)
        values = values * tl.load(place, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def _turned(values, cos, sin, pair, half, HEADS: tl.constexpr, SIZE: tl.constexpr, step):
    """Rotate pairs of neighbouring channels."""
    cosine = tl.load(cos + pair * step, mask=pair < half, other=1.0).to(tl.float32)[None, :]
    sine = tl.load(sin + pair * step, mask=pair < half, other=0.0).to(tl.float32)[None, :]
    even, odd = tl.split(tl.reshape(values, [HEADS, SIZE // 2, 2]))
    joined = tl.join(even * cosine - odd * sine, even * sine + odd * cosine)
    return tl.reshape(joined, [HEADS, SIZE])


@triton.jit
def heads_kernel(
    x, weight, cos, sin, out, tokens, count, size, out_tokens, offset, x_sample, x_token, x_head, rotation_sample,
    rotation_token, rotation_step, eps,
    NORM: tl.constexpr, ACROSS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """All heads of a token of queries, keys or (without norm and rotation) values."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    head, channel = tl.arange(0, HEADS), tl.arange(0, SIZE)
    inside = (head < count)[:, None] & (channel < size)[None, :]
    place = x + sample * x_sample + token * x_token + head[:, None] * x_head + channel[None, :]
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        values = _normed(values, weight, head, channel, inside, size, count, eps, ACROSS)
    if cos is not None:
        begin = sample * rotation_sample + token * rotation_token
        values = _turned(
            values, cos + begin, sin + begin, tl.arange(0, SIZE // 2), size // 2, HEADS, SIZE, rotation_step
        )
    row = sample * out_tokens + offset + token
    put = out + (row * count + head[:, None]) * size + channel[None, :]
    tl.store(put, values.to(out.dtype.element_ty), mask=inside)


def prepare_heads(streams: Sequence[Heads], norm: HeadNorm | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `kernels.rotary` asks for: queries and keys, and values if there are two streams."""
    every = sum(one.query.shape[1] for one in streams)
    first = streams[0]
    query, key, value = (_empty(part, every) for part in (first.query, first.key, first.value))
    offset = 0
    for one in streams:
        _launch(one.query, one.query_weight, one, norm, query, offset)
        _launch(one.key, one.key_weight, one, norm, key, offset)
        if len(streams) > 1:
            _launch(one.value, None, None, None, value, offset)
        offset += one.query.shape[1]
    return query, key, value if len(streams) > 1 else value.new_empty(0)


def _empty(part: torch.Tensor, tokens: int) -> torch.Tensor:
    return torch.empty((part.shape[0], tokens, *part.shape[2:]), dtype=part.dtype, device=part.device)


def _launch(
    x: torch.Tensor, weight: torch.Tensor | None, stream: Heads | None, norm: HeadNorm | None, out: torch.Tensor,
    offset: int,
) -> None:  # fmt: skip
    samples, tokens, count, size = x.shape
    x = by_row(x)
    cos, sin = stream.rotation if stream is not None and stream.rotation is not None else (None, None)
    if cos is not None and sin is not None and cos.stride() != sin.stride():
        cos, sin = cos.contiguous(), sin.contiguous()
    turns = (0, 0, 0) if cos is None else (cos.stride(0) if cos.shape[0] > 1 else 0, cos.stride(1), cos.stride(2))
    heads, width = triton.next_power_of_2(count), triton.next_power_of_2(size)
    heads_kernel[(samples * tokens,)](
        x, weight, cos, sin, out, tokens, count, size, out.shape[1], offset, x.stride(0), x.stride(1), x.stride(2),
        *turns, norm.eps if norm else 0.0, NORM=norm is not None, ACROSS=norm is not None and norm.across,
        HEADS=heads, SIZE=width, num_warps=warps(heads * width),
    )  # fmt: skip
