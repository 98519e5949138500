"""Queries, keys and values as 8-bit floats with a scale per head, by the pass that norms, rotates and joins them.

After an RMS norm over n channels with weight w no channel is larger than sqrt(n) * max |w|, and a rotation turns pairs
of channels, whose length that also bounds. So the scale of normalized queries and keys is known before they are, and
no pass looks for the largest one. That the largest codes go unused costs nothing measurable: e4m3 rounds relatively to
each number, over 14 octaves. Values, and what is not normalized, are searched for their largest number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from hasten.kernels.rotary import HeadNorm, Heads, flat, reference, unflat
from hasten.kernels.serving import codes_float8, launches, served

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""Codes of queries, keys and values, and scales."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SMALLEST_SCALE = 2.0**-40
"""Of a head of zeros. Kernels multiply scales of queries and keys, which must not become zero."""


@dataclass(frozen=True)
class CodedHeads:
    """What attention is computed on. Each code stands for itself times the scale of its sample and head."""

    query: torch.Tensor
    """[batch, tokens, heads, size] float8_e4m3fn, as the keys and values, which may have fewer heads."""
    key: torch.Tensor
    value: torch.Tensor
    scales: torch.Tensor
    """[3, batch, key heads] float32, of queries (a scale for those that share a key head), keys and values."""
    dtype: torch.dtype
    """Of the numbers that were rounded, and of attention's result."""

    def values(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the codes stand for, float32."""
        parts = zip((self.query, self.key, self.value), self.scales.unbind(), strict=True)
        query, key, value = (codes.float() * _by_head(scale, codes) for codes, scale in parts)
        return query, key, value


class HeadsAttention(Protocol):
    """Attention that takes queries and keys before their norm and rotation, to have them in the form it computes on.

    An attention module that carries one under the name `CARRIED` has its attention computed by it.
    """

    def __call__(self, streams: Sequence[Heads], norm: HeadNorm | None) -> torch.Tensor | None:
        """[batch, all tokens, heads, size] in the type of the streams, or None: attention is to be called as ever."""
        ...


CARRIED = "_hasten_attention"


def code_heads(streams: Sequence[Heads], norm: HeadNorm | None = None) -> CodedHeads:
    """What `rotary.prepare` computes of one or two streams, rounded once, from float32 to 8-bit floats.

    A single stream may have other numbers of queries than of keys, and fewer key heads. Numbers beyond the bound, which
    only a rotation that also stretches could make, become the largest code. Computes no gradients.
    """
    first, second = streams[0], streams[1] if len(streams) > 1 else None
    with torch.no_grad():
        if not _by_kernel(streams, norm):
            found = eager(streams, norm)
        elif torch.compiler.is_compiling():
            facts = (norm is not None, norm.eps if norm else 0.0, norm.across if norm else False)
            found = _operator(*flat(first), *flat(second), *facts)
        else:
            found = _computed(streams, norm)
    query, key, value, scales = found
    return CodedHeads(query, key, value, scales, first.query.dtype)


def _by_kernel(streams: Sequence[Heads], norm: HeadNorm | None) -> bool:
    parts = [part for one in streams for part in (one.query, one.key, one.value)]
    alike = all(part.dtype == parts[0].dtype and part.shape[-1] == parts[0].shape[-1] for part in parts)
    heads = {part.shape[2] for part in parts}
    usual = alike and (len(heads) == 1 or (norm is None and len(streams) == 1))
    return usual and served(*parts) and codes_float8(parts[0].device)


def _computed(streams: Sequence[Heads], norm: HeadNorm | None) -> Parts:
    if not streams[0].query.is_cuda:
        return eager(streams, norm)
    from hasten.kernels.triton.coded_heads import code

    launches["code_heads"] += 1
    return code(streams, norm)


def eager(streams: Sequence[Heads], norm: HeadNorm | None) -> Parts:
    """The reference: codes of queries, keys and values, and scales."""
    scales = (_largest(streams, norm) / LARGEST).clamp_min(SMALLEST_SCALE)
    parts = zip(reference(streams, norm, torch.float32), scales.unbind(), strict=True)
    query, key, value = (_rounded(part / _by_head(scale, part)) for part, scale in parts)
    return query, key, value, scales


def _rounded(values: torch.Tensor) -> torch.Tensor:
    return values.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).contiguous()


def _by_head(scale: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Scales [batch, key heads] beside heads [batch, tokens, heads, size]."""
    return scale.repeat_interleave(part.shape[2] // scale.shape[1], 1)[:, None, :, None]


def _largest(streams: Sequence[Heads], norm: HeadNorm | None) -> torch.Tensor:
    """What no query, key and value exceeds: [3, batch, key heads]."""
    groups = streams[0].key.shape[2]
    found = [
        torch.stack([
            _bound(one.query, one.query_weight, norm, groups) if norm else _found(one.query, one.rotation, groups),
            _bound(one.key, one.key_weight, norm, groups) if norm else _found(one.key, one.rotation, groups),
            _found(one.value, None, groups),
        ])
        for one in streams
    ]  # fmt: skip
    return torch.stack(found).amax(0)


def _bound(x: torch.Tensor, weight: torch.Tensor | None, norm: HeadNorm, groups: int) -> torch.Tensor:
    count = x.shape[2] * x.shape[3] if norm.across else x.shape[3]
    weights = x.new_ones(groups) if weight is None else weight
    parts = weights.float().abs().reshape(groups if norm.across else 1, -1)
    return (math.sqrt(count) * parts.amax(-1)).expand(x.shape[0], groups)


def _found(x: torch.Tensor, rotation: object | None, groups: int) -> torch.Tensor:
    """The largest number of each head; a pair of such may be turned into one channel."""
    found = x.abs().unflatten(2, (groups, -1)).amax((1, 3, 4)).float()
    return found if rotation is None else found * math.sqrt(2)


@torch.library.custom_op("hasten::code_heads", mutates_args=())
def _operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, query2: torch.Tensor | None,
    key2: torch.Tensor | None, value2: torch.Tensor | None, query_weight2: torch.Tensor | None,
    key_weight2: torch.Tensor | None, cos2: torch.Tensor | None, sin2: torch.Tensor | None, normalized: bool,
    eps: float, across: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    streams = unflat(query, key, value, query_weight, key_weight, cos, sin)
    streams += unflat(query2, key2, value2, query_weight2, key_weight2, cos2, sin2)
    return _computed(streams, HeadNorm(eps, across) if normalized else None)


@_operator.register_fake
def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> object:
    other = rest[4]
    more = other.shape[1] if isinstance(other, torch.Tensor) else 0
    shapes = [(part.shape[0], part.shape[1] + more, *part.shape[2:]) for part in (query, key, value)]
    codes = (query.new_empty(shape, dtype=torch.float8_e4m3fn) for shape in shapes)
    return *codes, query.new_empty((3, key.shape[0], key.shape[2]), dtype=torch.float32)
