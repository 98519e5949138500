"""The kernel behind `kernels.gated`: a program activates a token and, if wanted, rounds it to 8 bits."""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, ANN202, N803 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hasten.kernels.coded import DTYPES, Coding
from hasten.kernels.triton.tokens import coding_facts
from hasten.kernels.triton.tools import by_row, rotated, store_codes, warps

_KINDS = {"gelu": 0, "gelu_tanh": 1, "swiglu": 2}
PART = 4096
"""Channels that a program handles where rows need not be whole."""


@triton.jit
def _activated(values, KIND: tl.constexpr):
    if KIND == 0:
        return 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))
    if KIND == 1:
        inner = 0.7978845608028654 * (values + 0.044715 * values * values * values)
        return values * tl.sigmoid(2.0 * inner)
    return values * tl.sigmoid(values)


@triton.jit
def activation_kernel(
    x, other, smooth, out, scales, width, x_row, other_row,
    KIND: tl.constexpr, TWO: tl.constexpr, FOURS: tl.constexpr, LARGEST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One token (with codes), or SIZE channels of it."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    inside = columns < width
    values = tl.load(x + row * x_row + columns, mask=inside, other=0.0).to(tl.float32)
    values = _activated(values, KIND)
    if KIND == 2:
        values = values * tl.load(other + row * other_row + columns, mask=inside, other=0.0).to(tl.float32)
    place = out + row * width + columns
    if LARGEST:
        if smooth is not None:
            values = values / tl.load(smooth + columns, mask=inside, other=1.0).to(tl.float32)
        values = rotated(values, SIZE, TWO, FOURS)
        store_codes(values, place, scales, row, inside, LARGEST)
    else:
        tl.store(place, values.to(out.dtype.element_ty), mask=inside)


def activate(
    x: torch.Tensor, kind: str, other: torch.Tensor | None, coding: Coding | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `kernels.gated` asks for: activated tokens or their codes, and the scales of codes."""
    flat = by_row(x.reshape(-1, x.shape[-1]))
    second = None if other is None else by_row(other.reshape(-1, x.shape[-1]))
    rows, width = flat.shape
    out = torch.empty(x.shape, dtype=DTYPES[coding.kind] if coding else x.dtype, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1) if coding else (0,), dtype=torch.float32, device=x.device)
    whole = triton.next_power_of_2(width)
    size = whole if coding else min(whole, PART)
    activation_kernel[(rows, triton.cdiv(width, size))](
        flat, second, coding.smooth if coding else None, out, scales, width, flat.stride(0),
        0 if second is None else second.stride(0), KIND=_KINDS[kind], **coding_facts(coding), SIZE=size,
        num_warps=warps(size),
    )  # fmt: skip
    return out, scales
