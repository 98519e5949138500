"""Norm of queries and keys, and their rotation by position, in one pass that also joins two streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hasten.kernels.serving import launches, served

Rotation = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, [batch or 1, tokens, size / 2]; pair i of neighbouring channels turns by the angle i."""


@dataclass(frozen=True)
class Heads:
    """Queries, keys and values of one stream, [batch, tokens, heads, size]."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    query_weight: torch.Tensor | None = None
    """Of the RMS norm: [size], or [heads * size] where all heads are normalized together."""
    key_weight: torch.Tensor | None = None
    rotation: Rotation | None = None


@dataclass(frozen=True)
class HeadNorm:
    """The RMS norm of queries and keys."""

    eps: float
    across: bool = False
    """Over all heads together?"""


def prepare(streams: Sequence[Heads], norm: HeadNorm | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of one or two streams as attention takes them: [batch, all tokens, heads, size].

    Sums are taken in float32. The values of a single stream are returned as they are.
    """
    first, second = streams[0], streams[1] if len(streams) > 1 else None
    every = [part for one in streams for part in (one.query, one.key, one.value)]
    if not served(*every):
        return _reference(streams, norm)
    facts = (norm is not None, norm.eps if norm else 0.0, norm.across if norm else False)
    query, key, value = _operator(*_flat(first), *_flat(second), *facts)
    return query, key, first.value if second is None else value


def _flat(one: Heads | None) -> tuple[torch.Tensor | None, ...]:
    if one is None:
        return (None,) * 7
    return one.query, one.key, one.value, one.query_weight, one.key_weight, *(one.rotation or (None, None))


def _reference(streams: Sequence[Heads], norm: HeadNorm | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries = [_turned(_normed(one.query, one.query_weight, norm), one.rotation, one.query.dtype) for one in streams]
    keys = [_turned(_normed(one.key, one.key_weight, norm), one.rotation, one.key.dtype) for one in streams]
    return _join(queries), _join(keys), _join([one.value for one in streams])


def _join(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _normed(x: torch.Tensor, weight: torch.Tensor | None, norm: HeadNorm | None) -> torch.Tensor:
    values = x.float()
    if norm is None:
        return values
    values = values.flatten(2) if norm.across else values
    values = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + norm.eps)
    values = values if weight is None else values * weight.float()
    return values.unflatten(-1, x.shape[2:]) if norm.across else values


def _turned(values: torch.Tensor, rotation: Rotation | None, dtype: torch.dtype) -> torch.Tensor:
    if rotation is None:
        return values.to(dtype)
    cos, sin = (part.float().unsqueeze(2) for part in rotation)
    even, odd = values.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(dtype)


@torch.library.custom_op("hasten::prepare_heads", mutates_args=())
def _operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, query2: torch.Tensor | None,
    key2: torch.Tensor | None, value2: torch.Tensor | None, query_weight2: torch.Tensor | None,
    key_weight2: torch.Tensor | None, cos2: torch.Tensor | None, sin2: torch.Tensor | None, normalized: bool,
    eps: float, across: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Queries, keys, and values if there are two streams (otherwise empty)."""
    streams = [Heads(query, key, value, query_weight, key_weight, _rotation(cos, sin))]
    if query2 is not None and key2 is not None and value2 is not None:
        streams.append(Heads(query2, key2, value2, query_weight2, key_weight2, _rotation(cos2, sin2)))
    norm = HeadNorm(eps, across) if normalized else None
    if not query.is_cuda:
        return eager(streams, norm)
    from hasten.kernels.triton.heads import prepare_heads

    launches["prepare_heads"] += 1
    return prepare_heads(streams, norm)


def _rotation(cos: torch.Tensor | None, sin: torch.Tensor | None) -> Rotation | None:
    return None if cos is None or sin is None else (cos, sin)


def eager(streams: Sequence[Heads], norm: HeadNorm | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the operator returns, by the reference: tensors of its own."""
    query, key, value = _reference(streams, norm)
    value = value if len(streams) > 1 else value.new_empty(0)
    own = [
        part.clone() if part is given else part for part, given in ((query, streams[0].query), (key, streams[0].key))
    ]
    return own[0].contiguous(), own[1].contiguous(), value.contiguous()


@_operator.register_fake
def _fake(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> object:
    other = rest[4]
    more = other.shape[1] if isinstance(other, torch.Tensor) else 0
    shape = (query.shape[0], query.shape[1] + more, *query.shape[2:])
    values = value.new_empty(shape if more else (0,))
    return query.new_empty(shape), key.new_empty(shape), values
