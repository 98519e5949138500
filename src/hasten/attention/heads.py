"""Attention that has its 8-bit numbers written by the pass before it, which norms and rotates queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hasten.attention.call import AttentionCall
from hasten.attention.choosing import CHOICES, served, settled
from hasten.attention.kernels import KERNELS
from hasten.attention.kernels.base import RunCodes
from hasten.attention.kernels.tools import token_major
from hasten.attention.operator import Calls, calls, compute
from hasten.kernels.coded_heads import code_heads
from hasten.kernels.rotary import HeadNorm, Heads, flat, prepare, unflat

TAKEN = "codes from the pass before"
"""The name under which calls are counted, beside the kernel's, whose numbers were rounded by the pass before."""


class FromHeads:
    """What attention modules carry while 8-bit attention is applied; see `kernels.coded_heads.HeadsAttention`."""

    def __init__(self, asked: str, least: int, counted: Calls) -> None:
        self._asked, self._least, self._counted = asked, least, counted

    def __call__(self, streams: Sequence[Heads], norm: HeadNorm | None) -> torch.Tensor | None:
        """The result on codes, or None where they are not wanted: then attention is called as ever."""
        if not torch.compiler.is_compiling():
            # The mode that redirects attention would be asked at every look at a shape, 160 us a call.
            with torch._C.DisableTorchFunction():
                return _on_codes(streams, norm, self._asked, self._least, self._counted)
        # Which kernel serves is known when the compiled code runs.
        second = streams[1] if len(streams) > 1 else None
        facts = (norm is not None, norm.eps if norm else 0.0, norm.across if norm else False)
        return attend_heads(*flat(streams[0]), *flat(second), *facts, self._asked, self._least)

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies of a module are as without hasten: they carry None."""
        return (_nothing, ())


def _nothing() -> None:
    return None


def may_take_codes(asked: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Is a kernel that takes codes asked for, or among those to choose from?"""
    names = CHOICES[asked].names if asked in CHOICES else (asked,)
    return any(KERNELS[name].codes and not KERNELS[name].problem(device, dtype) for name in names)


def _on_codes(
    streams: Sequence[Heads], norm: HeadNorm | None, asked: str, least: int, counted: Calls
) -> torch.Tensor | None:
    call = _described(streams)
    run = _run(call, asked, least)
    if run is None:
        return None
    counted[asked, call] += 1
    counted[TAKEN, call] += 1
    return run(code_heads(streams, norm), None)


def _described(streams: Sequence[Heads]) -> AttentionCall:
    first = streams[0]
    batch, _, heads, size = first.query.shape
    queries, keys = sum(one.query.shape[1] for one in streams), sum(one.key.shape[1] for one in streams)
    parts = [part for one in streams for part in (one.query, one.key, one.value)]
    wanted = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    sizes = (batch, heads, first.key.shape[2], queries, keys, size, first.value.shape[3])
    return AttentionCall(first.query.device, first.query.dtype, *sizes, gradients=wanted)


def _run(call: AttentionCall, asked: str, least: int) -> RunCodes | None:
    """What computes this call on codes, or None."""
    if call.keys < least or not served(asked, call):
        return None
    name = settled(asked, call)
    return KERNELS[name].codes if name and KERNELS[name].takes_codes(call) else None


@torch.library.custom_op("hasten::attend_heads", mutates_args=())
def attend_heads(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, query_weight: torch.Tensor | None,
    key_weight: torch.Tensor | None, cos: torch.Tensor | None, sin: torch.Tensor | None, query2: torch.Tensor | None,
    key2: torch.Tensor | None, value2: torch.Tensor | None, query_weight2: torch.Tensor | None,
    key_weight2: torch.Tensor | None, cos2: torch.Tensor | None, sin2: torch.Tensor | None, normalized: bool,
    eps: float, across: bool, asked: str, least: int,
) -> torch.Tensor:  # fmt: skip
    """Norm, rotation and attention of one or two streams of heads, on codes where a kernel takes them."""
    streams = unflat(query, key, value, query_weight, key_weight, cos, sin)
    streams += unflat(query2, key2, value2, query_weight2, key_weight2, cos2, sin2)
    norm = HeadNorm(eps, across) if normalized else None
    found = _on_codes(streams, norm, asked, least, calls)
    if found is None:
        near, far, values = token_major(*prepare(streams, norm))
        found = compute(near, far, values, None, 0.0, None, asked, least, calls).transpose(1, 2)
    return found.contiguous()


@attend_heads.register_fake
def _shape_of_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: object) -> torch.Tensor:
    other = rest[4]
    more = other.shape[1] if isinstance(other, torch.Tensor) else 0
    return query.new_empty((query.shape[0], query.shape[1] + more, query.shape[2], value.shape[3]))
