"""The kernels behind `kernels.coded_heads`: bounds of heads, the largest numbers of the others, then all codes."""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, ANN202, N803 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from hasten.kernels.coded_heads import LARGEST, SMALLEST_SCALE, Parts
from hasten.kernels.rotary import HeadNorm, Heads
from hasten.kernels.triton.heads import normed, turned, turns
from hasten.kernels.triton.tools import by_row, warps

_TOKENS = 8
"""Tokens whose largest number a program finds."""


@triton.jit
def _reach(weight, head, channel, inside, size, ACROSS: tl.constexpr):
    """The largest weight of each head, [heads]; 1 without weights."""
    values = tl.where(inside, 1.0, 0.0)
    if weight is not None:
        place = weight + channel[None, :] + head[:, None] * (size if ACROSS else 0)
        values = tl.abs(tl.load(place, mask=inside, other=0.0).to(tl.float32))
    return tl.max(values, 1)


@triton.jit
def bounds_kernel(
    query_weight, key_weight, query_weight2, key_weight2, scales, count, size, reach, smallest,
    NORM: tl.constexpr, ACROSS: tl.constexpr, TWO: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Scales of one sample's queries, keys or values, as far as they are known; the others begin at the smallest."""
    sample, part = tl.program_id(0), tl.program_id(1)
    head, channel = tl.arange(0, HEADS), tl.arange(0, SIZE)
    inside = (head < count)[:, None] & (channel < size)[None, :]
    bound = tl.zeros([HEADS], tl.float32)
    if NORM:
        if part == 0:
            bound = _reach(query_weight, head, channel, inside, size, ACROSS) * reach
            if TWO:
                bound = tl.maximum(bound, _reach(query_weight2, head, channel, inside, size, ACROSS) * reach)
        elif part == 1:
            bound = _reach(key_weight, head, channel, inside, size, ACROSS) * reach
            if TWO:
                bound = tl.maximum(bound, _reach(key_weight2, head, channel, inside, size, ACROSS) * reach)
    place = scales + (part * tl.num_programs(0) + sample) * count + head
    tl.store(place, tl.maximum(bound, smallest), mask=head < count)


@triton.jit
def _find(
    x, scales, sample, first, tokens, count, groups, size, x_sample, x_token, x_head, factor,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Raise the scales of a sample's heads to what some tokens need."""
    head, channel = tl.arange(0, HEADS), tl.arange(0, SIZE)
    inside = (head < count)[:, None] & (channel < size)[None, :]
    place = x + sample * x_sample + head[:, None] * x_head + channel[None, :]
    found = tl.zeros([HEADS, SIZE], tl.float32)
    for step in tl.static_range(TOKENS):
        token = first + step
        values = tl.load(place + token * x_token, mask=inside & (token < tokens), other=0.0).to(tl.float32)
        found = tl.maximum(found, tl.abs(values))
    # Numbers that are not negative are ordered as their bits are.
    bits = (tl.max(found, 1) * factor).to(tl.int32, bitcast=True)
    into = (scales + sample * groups + head // (count // groups)).to(tl.pointer_type(tl.int32), bitcast=True)
    tl.atomic_max(into, bits, mask=head < count, sem="relaxed")


@triton.jit
def largest_kernel(
    query, key, value, scales, samples, tokens, key_tokens, count, groups, size, query_sample, query_token,
    query_head, key_sample, key_token, key_head, value_sample, value_token, value_head, turned, plain,
    FIRST: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The largest queries and keys (with FIRST 0) and values of some tokens."""
    sample, part = tl.program_id(1).to(tl.int64), tl.program_id(2) + FIRST
    first = tl.program_id(0) * TOKENS
    scales += part * samples * groups
    if part == 2:
        _find(value, scales, sample, first, key_tokens, groups, groups, size, value_sample, value_token, value_head,
              plain, TOKENS, GROUPS, SIZE)  # fmt: skip
    elif FIRST == 0:
        if part == 0:
            _find(query, scales, sample, first, tokens, count, groups, size, query_sample, query_token, query_head,
                  turned, TOKENS, HEADS, SIZE)  # fmt: skip
        else:
            _find(key, scales, sample, first, key_tokens, groups, groups, size, key_sample, key_token, key_head,
                  turned, TOKENS, GROUPS, SIZE)  # fmt: skip


@triton.jit
def _code(
    x, weight, cos, sin, scales, out, sample, token, row, count, groups, size, x_sample, x_token, x_head, begin,
    rotation_step, eps, largest,
    NORM: tl.constexpr, ACROSS: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """All heads of a token as codes."""
    head, channel = tl.arange(0, HEADS), tl.arange(0, SIZE)
    inside = (head < count)[:, None] & (channel < size)[None, :]
    place = x + sample * x_sample + token * x_token + head[:, None] * x_head + channel[None, :]
    values = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        values = normed(values, weight, head, channel, inside, size, count, eps, ACROSS)
    if cos is not None:
        pair = tl.arange(0, SIZE // 2)
        values = turned(values, cos + begin, sin + begin, pair, size // 2, HEADS, SIZE, rotation_step)
    scale = tl.load(scales + sample * groups + head // (count // groups), mask=head < count, other=1.0)
    values = tl.clamp(values * (1.0 / scale)[:, None], -largest, largest, propagate_nan=tl.PropagateNan.ALL)
    put = out + (row * count + head[:, None]) * size + channel[None, :]
    tl.store(put, values.to(tl.float8e4nv), mask=inside)


@triton.jit
def codes_kernel(
    query, key, value, query_weight, key_weight, cos, sin, scales, query_out, key_out, value_out, samples, tokens,
    key_tokens, query_total, key_total, offset, count, groups, size, query_sample, query_token, query_head,
    key_sample, key_token, key_head, value_sample, value_token, value_head, rotation_sample, rotation_token,
    rotation_step, eps, largest,
    NORM: tl.constexpr, ACROSS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """The queries, keys or values of a token."""
    token, sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    begin = sample * rotation_sample + token * rotation_token
    if part == 0:
        if token < tokens:
            _code(query, query_weight, cos, sin, scales, query_out, sample, token,
                  sample * query_total + offset + token, count, groups, size, query_sample, query_token, query_head,
                  begin, rotation_step, eps, largest, NORM, ACROSS, HEADS, SIZE)  # fmt: skip
    elif token < key_tokens:
        row = sample * key_total + offset + token
        if part == 1:
            _code(key, key_weight, cos, sin, scales + samples * groups, key_out, sample, token, row, groups, groups,
                  size, key_sample, key_token, key_head, begin, rotation_step, eps, largest,
                  NORM, ACROSS, GROUPS, SIZE)  # fmt: skip
        else:
            _code(value, None, None, None, scales + 2 * samples * groups, value_out, sample, token, row, groups,
                  groups, size, value_sample, value_token, value_head, begin, rotation_step, eps, largest,
                  False, ACROSS, GROUPS, SIZE)  # fmt: skip


def code(streams: Sequence[Heads], norm: HeadNorm | None) -> Parts:
    """What `kernels.coded_heads` asks for: codes of queries, keys and values, and scales [3, samples, key heads]."""
    first = streams[0]
    codes = [
        torch.empty((part[0].shape[0], sum(one.shape[1] for one in part), *part[0].shape[2:]),
                    dtype=torch.float8_e4m3fn, device=part[0].device)
        for part in ([one.query for one in streams], [one.key for one in streams], [one.value for one in streams])
    ]  # fmt: skip
    scales = _bounds(first, streams[1] if len(streams) > 1 else None, norm)
    offset = 0
    parts = [(one, [by_row(part) for part in (one.query, one.key, one.value)]) for one in streams]
    for one, heads in parts:
        _raise(heads, scales, norm is not None, one.rotation is not None)
    for one, heads in parts:
        _write(heads, one, scales, codes, norm, offset)
        offset += one.query.shape[1]
    query, key, value = codes
    return query, key, value, scales


def _bounds(first: Heads, second: Heads | None, norm: HeadNorm | None) -> torch.Tensor:
    samples, _, count, size = first.key.shape
    scales = torch.empty((3, samples, count), dtype=torch.float32, device=first.key.device)
    others = (None, None) if second is None else (second.query_weight, second.key_weight)
    across = norm is not None and norm.across
    reach = math.sqrt(count * size if across else size) / LARGEST
    heads, width = triton.next_power_of_2(count), triton.next_power_of_2(size)
    bounds_kernel[(samples, 3)](
        first.query_weight, first.key_weight, *others, scales, count, size, reach, SMALLEST_SCALE,
        NORM=norm is not None, ACROSS=across, TWO=second is not None, HEADS=heads, SIZE=width,
        num_warps=warps(heads * width),
    )  # fmt: skip
    return scales


def _raise(heads: list[torch.Tensor], scales: torch.Tensor, bounded: bool, rotated: bool) -> None:
    """Look for the largest numbers of values, and of queries and keys that have no bound."""
    query, key, _ = heads
    samples, tokens, count, size = query.shape
    most = key.shape[1] if bounded else max(tokens, key.shape[1])
    turned = math.sqrt(2) / LARGEST if rotated else 1 / LARGEST
    sizes = _padded(heads)
    largest_kernel[(triton.cdiv(most, _TOKENS), samples, 1 if bounded else 3)](
        *heads, scales, samples, tokens, key.shape[1], count, key.shape[2], size, *_strides(heads), turned, 1 / LARGEST,
        FIRST=2 if bounded else 0, TOKENS=_TOKENS, **sizes, num_warps=warps(sizes["HEADS"] * sizes["SIZE"]),
    )  # fmt: skip


def _write(
    heads: list[torch.Tensor], one: Heads, scales: torch.Tensor, codes: list[torch.Tensor], norm: HeadNorm | None,
    offset: int,
) -> None:  # fmt: skip
    query, key, _ = heads
    samples, tokens, count, size = query.shape
    cos, sin, *steps = turns(one.rotation)
    sizes = _padded(heads)
    codes_kernel[(max(tokens, key.shape[1]), samples, 3)](
        *heads, one.query_weight, one.key_weight, cos, sin, scales, *codes, samples, tokens, key.shape[1],
        codes[0].shape[1], codes[1].shape[1], offset, count, key.shape[2], size, *_strides(heads), *steps,
        norm.eps if norm else 0.0, LARGEST, NORM=norm is not None, ACROSS=norm is not None and norm.across, **sizes,
        num_warps=warps(sizes["HEADS"] * sizes["SIZE"]),
    )  # fmt: skip


def _padded(heads: list[torch.Tensor]) -> dict[str, int]:
    query, key, _ = heads
    counts = (query.shape[2], key.shape[2], query.shape[3])
    return dict(zip(("HEADS", "GROUPS", "SIZE"), map(triton.next_power_of_2, counts), strict=True))


def _strides(heads: list[torch.Tensor]) -> list[int]:
    return [step for part in heads for step in part.stride()[:3]]
