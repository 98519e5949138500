"""Gate and residual connection, norm, shift and scale, and rounding to 8 bits, in one pass over the tokens.

total = x + gate * after(y);  out = norm(total) * (1 + scale) + shift;  all sums in float32. Between these steps nothing
is written, so that a token is read once (x and y) and written once or twice (total and out).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from hasten.kernels.coded import DTYPES, Coded, Coding, code
from hasten.kernels.serving import codes_float8, launches, served


@dataclass(frozen=True)
class Norm:
    """A norm over the channels of a token."""

    kind: Literal["layer", "rms"]
    eps: float
    weight: torch.Tensor | None = None
    """[channels]"""
    bias: torch.Tensor | None = None
    """[channels]"""


@dataclass(frozen=True)
class Added:
    """What is added to a stream."""

    value: torch.Tensor
    """[batch, tokens, channels]"""
    gate: torch.Tensor | None = None
    """[batch, channels], [batch, 1, channels] or [batch, tokens, channels]"""
    after: Norm | None = None
    """A norm of the value, before the gate; only of kind "rms" and with a weight."""


@dataclass(frozen=True)
class Normalizing:
    """Norm, shift and scale, and, if wanted, rounding to 8 bits."""

    norm: Norm
    shift: torch.Tensor | None = None
    """As a gate; the same for all tokens of a sample where streams are joined."""
    scale: torch.Tensor | None = None
    coding: Coding | None = None


def add(x: torch.Tensor, added: Added) -> torch.Tensor:
    """x + gate * after(value), [batch, tokens, channels], in the type of x; float16 is kept from overflowing."""
    if not served(x, added.value):
        return _sum(x, added)
    return _operator(x, None, *_added(added), None, None, None, None, None, *_added_facts(added), "", 0.0, "", 1)[0]


def normalize(streams: Sequence[torch.Tensor], how: Normalizing) -> torch.Tensor | Coded:
    """norm(x) * (1 + scale) + shift of one or two streams [batch, tokens, channels], joined to one sequence."""
    first, second = streams[0], streams[1] if len(streams) > 1 else None
    if not served(first, second) or not _codes(first, how.coding):
        return _normalized(torch.cat(list(streams), 1) if second is not None else first, how)
    nothing = (None, None, None)
    _, out, scales = _operator(first, second, *nothing, *_normalizing(how), False, 0.0, *_facts(how))
    return _outcome(out, scales, how.coding, first.dtype)


def add_and_normalize(x: torch.Tensor, added: Added, how: Normalizing) -> tuple[torch.Tensor, torch.Tensor | Coded]:
    """`add`, and `normalize` of its result."""
    if not served(x, added.value) or not _codes(x, how.coding):
        total = _sum(x, added)
        return total, _normalized(total, how)
    total, out, scales = _operator(
        x, None, *_added(added), *_normalizing(how), *_added_facts(added), *_facts(how)
    )  # fmt: skip
    return total, _outcome(out, scales, how.coding, x.dtype)


def _codes(x: torch.Tensor, coding: Coding | None) -> bool:
    return coding is None or coding.kind == "int8" or codes_float8(x.device)


def _outcome(
    out: torch.Tensor, scales: torch.Tensor, coding: Coding | None, dtype: torch.dtype
) -> torch.Tensor | Coded:
    return out if coding is None else Coded(out, scales, dtype)


def _sum(x: torch.Tensor, added: Added) -> torch.Tensor:
    """The eager reference of `add`."""
    value = added.value.float() if added.after is None else _norm(added.value.float(), added.after)
    total = x.float() + (value if added.gate is None else by_token(added.gate).float() * value)
    return (total.clamp(-65504, 65504) if x.dtype == torch.float16 else total).to(x.dtype)


def _normalized(x: torch.Tensor, how: Normalizing) -> torch.Tensor | Coded:
    """The eager reference of `normalize`."""
    found = _norm(x.float(), how.norm)
    found = found if how.scale is None else found * (1 + by_token(how.scale).float())
    found = found if how.shift is None else found + by_token(how.shift).float()
    return found.to(x.dtype) if how.coding is None else code(found, how.coding, x.dtype)


def _norm(values: torch.Tensor, norm: Norm) -> torch.Tensor:
    size = (values.shape[-1],)
    weight, bias = (None if part is None else part.float() for part in (norm.weight, norm.bias))
    if norm.kind == "layer":
        return F.layer_norm(values, size, weight, bias, norm.eps)
    found = values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + norm.eps)
    found = found if weight is None else found * weight
    return found if bias is None else found + bias


def by_token(modulation: torch.Tensor) -> torch.Tensor:
    """[batch, channels] as [batch, 1, channels]; with a dimension of tokens as it is."""
    return modulation.unsqueeze(1) if modulation.dim() == 2 else modulation


def _added(added: Added) -> tuple[torch.Tensor | None, ...]:
    return added.value, added.gate, added.after.weight if added.after else None


def _added_facts(added: Added) -> tuple[bool, float]:
    return added.after is not None, added.after.eps if added.after else 0.0


def _normalizing(how: Normalizing) -> tuple[torch.Tensor | None, ...]:
    return how.norm.weight, how.norm.bias, how.shift, how.scale, how.coding.smooth if how.coding else None


def _facts(how: Normalizing) -> tuple[str, float, str, int]:
    coding = how.coding
    return how.norm.kind, how.norm.eps, coding.kind if coding else "", coding.rotation if coding else 1


@torch.library.custom_op("hasten::residual_norm", mutates_args=())
def _operator(
    x: torch.Tensor, second: torch.Tensor | None, y: torch.Tensor | None, gate: torch.Tensor | None,
    after_weight: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None,
    shift: torch.Tensor | None, scale: torch.Tensor | None, smooth: torch.Tensor | None, after: bool, after_eps: float,
    kind: str, eps: float, coding: str, rotation: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The sum, the normalized tokens (or their codes) and the scales of these; empty where there is none."""
    added = None if y is None else Added(y, gate, Norm("rms", after_eps, after_weight) if after else None)
    rounding = Coding(coding, smooth, rotation) if coding else None  # pyright: ignore[reportArgumentType]
    how = Normalizing(Norm(kind, eps, weight, bias), shift, scale, rounding) if kind else None  # pyright: ignore
    if not x.is_cuda:
        return eager(x, second, added, how)
    from hasten.kernels.triton.tokens import residual_norm

    launches["residual_norm"] += 1
    return residual_norm(x, second, added, how)


def eager(
    x: torch.Tensor, second: torch.Tensor | None, added: Added | None, how: Normalizing | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the operator returns, by the references."""
    total = x if added is None else _sum(x, added)
    out = None if how is None else _normalized(total if second is None else torch.cat([total, second], 1), how)
    none = x.new_empty(0)
    codes, scales = (out.codes, out.scales) if isinstance(out, Coded) else (none if out is None else out, none.clone())
    return none.clone() if added is None else total.contiguous(), codes.contiguous(), scales.float()


@_operator.register_fake
def _fake(x: torch.Tensor, second: torch.Tensor | None, y: torch.Tensor | None, *rest: object) -> object:
    kind, coding = rest[9], rest[11]
    tokens = x.shape[1] + (0 if second is None else second.shape[1])
    shape = (x.shape[0], tokens, x.shape[2]) if kind else (0,)
    out = x.new_empty(shape, dtype=DTYPES.get(str(coding), x.dtype))
    scales = x.new_empty((*shape[:-1], 1) if coding else (0,), dtype=torch.float32)
    return x.new_empty((0,) if y is None else x.shape), out, scales
