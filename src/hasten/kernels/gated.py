"""The activation of a feed-forward and the rounding of its result to 8 bits, in one pass."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from hasten.core.block import Activation
from hasten.kernels.coded import DTYPES, Coded, Coding, code
from hasten.kernels.serving import codes_float8, launches, served


def activate(
    x: torch.Tensor, kind: Activation, other: torch.Tensor | None = None, coding: Coding | None = None
) -> torch.Tensor | Coded:
    """gelu(x), or silu(x) * other, of tensors [..., channels], computed in float32."""
    if not served(x, other) or (coding is not None and coding.kind == "float8" and not codes_float8(x.device)):
        return _outcome(_activated(x, kind, other), coding, x.dtype)
    facts = (coding.kind, coding.rotation) if coding else ("", 1)
    out, scales = _operator(x, other, coding.smooth if coding else None, kind, *facts)
    return out if coding is None else Coded(out, scales, x.dtype)


def _activated(x: torch.Tensor, kind: str, other: torch.Tensor | None) -> torch.Tensor:
    """The eager reference, float32."""
    if kind != "swiglu":
        return F.gelu(x.float(), approximate="tanh" if kind == "gelu_tanh" else "none")
    assert other is not None
    return F.silu(x.float()) * other.float()


def _outcome(found: torch.Tensor, coding: Coding | None, dtype: torch.dtype) -> torch.Tensor | Coded:
    return found.to(dtype) if coding is None else code(found, coding, dtype)


@torch.library.custom_op("hasten::activate", mutates_args=())
def _operator(
    x: torch.Tensor, other: torch.Tensor | None, smooth: torch.Tensor | None, kind: str, coding: str, rotation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The activated tokens (or their codes), and the scales of codes."""
    rounding = Coding(coding, smooth, rotation) if coding else None  # pyright: ignore[reportArgumentType]
    if not x.is_cuda:
        return eager(x, kind, other, rounding)
    from hasten.kernels.triton.activate import activate as launch

    launches["activate"] += 1
    return launch(x, kind, other, rounding)


def eager(
    x: torch.Tensor, kind: str, other: torch.Tensor | None, coding: Coding | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the operator returns, by the reference."""
    found = _outcome(_activated(x, kind, other), coding, x.dtype)
    if isinstance(found, Coded):
        return found.codes.contiguous(), found.scales
    return found.contiguous(), x.new_empty(0, dtype=torch.float32)


@_operator.register_fake
def _fake(
    x: torch.Tensor, other: torch.Tensor | None, smooth: torch.Tensor | None, kind: str, coding: str, rotation: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scales = x.new_empty((*x.shape[:-1], 1) if coding else (0,), dtype=torch.float32)
    return x.new_empty(x.shape, dtype=DTYPES.get(coding, x.dtype)), scales
