"""The kernel behind `kernels.residual`: a program reads a token once and does all that lies between two products."""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, ANN202, N803 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hasten.kernels.coded import DTYPES, Coding
from hasten.kernels.residual import Added, Norm, Normalizing
from hasten.kernels.triton.tools import by_row, rotated, stages, store_codes, token_strides, warps


@triton.jit
def _load(pointer, columns, inside):
    return tl.load(pointer + columns, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _added(x, y, gate, after_weight, columns, inside, width, after_eps, AFTER: tl.constexpr, HALF: tl.constexpr):
    """x + gate * after(y) of a token."""
    value = _load(y, columns, inside)
    if AFTER:
        value = value * tl.rsqrt(tl.sum(value * value, 0) / width + after_eps)
        if after_weight is not None:
            value = value * _load(after_weight, columns, inside)
    if gate is not None:
        value = value * _load(gate, columns, inside)
    total = x + value
    return tl.minimum(tl.maximum(total, -65504.0), 65504.0) if HALF else total


@triton.jit
def _normed(values, weight, bias, columns, inside, width, eps, RMS: tl.constexpr):
    if not RMS:
        values = tl.where(inside, values - tl.sum(values, 0) / width, 0.0)
    values = values * tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    if weight is not None:
        values = values * _load(weight, columns, inside)
    if bias is not None:
        values = values + _load(bias, columns, inside)
    return values


@triton.jit
def _modulated(values, shift, scale, columns, inside):
    if scale is not None:
        values = values * (1.0 + _load(scale, columns, inside))
    if shift is not None:
        values = values + _load(shift, columns, inside)
    return values


@triton.jit
def _at(pointer, sample, token, sample_stride, token_stride):
    return pointer if pointer is None else pointer + sample * sample_stride + token * token_stride


@triton.jit
def token_kernel(
    x, y, gate, after_weight, weight, bias, shift, scale, smooth, total, out, scales,
    tokens, width, out_tokens, offset,
    x_sample, x_token, y_sample, y_token, gate_sample, gate_token, shift_sample, shift_token, scale_sample,
    scale_token, after_eps, eps,
    ADD: tl.constexpr, AFTER: tl.constexpr, NORM: tl.constexpr, RMS: tl.constexpr, HALF: tl.constexpr,
    TWO: tl.constexpr, FOURS: tl.constexpr, LARGEST: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One token: sum, norm, modulation, and codes of it. `offset` is where the stream begins in the joined one."""
    row = tl.program_id(0).to(tl.int64)
    sample, token = row // tokens, row % tokens
    columns = tl.arange(0, SIZE)
    inside = columns < width
    values = _load(x + sample * x_sample + token * x_token, columns, inside)
    if ADD:
        near = y + sample * y_sample + token * y_token
        open_gate = _at(gate, sample, token, gate_sample, gate_token)
        values = _added(values, near, open_gate, after_weight, columns, inside, width, after_eps, AFTER, HALF)
        stored = values.to(total.dtype.element_ty)
        tl.store(total + row * width + columns, stored, mask=inside)
        values = stored.to(tl.float32)
    if NORM:
        values = _normed(values, weight, bias, columns, inside, width, eps, RMS)
        shift = _at(shift, sample, token, shift_sample, shift_token)
        scale = _at(scale, sample, token, scale_sample, scale_token)
        values = _modulated(values, shift, scale, columns, inside)
        out_row = sample * out_tokens + offset + token
        place = out + out_row * width + columns
        if LARGEST:
            if smooth is not None:
                values = values / tl.load(smooth + columns, mask=inside, other=1.0).to(tl.float32)
            values = rotated(values, SIZE, TWO, FOURS)
            store_codes(values, place, scales, out_row, inside, LARGEST)
        else:
            tl.store(place, values.to(out.dtype.element_ty), mask=inside)


def residual_norm(
    x: torch.Tensor, second: torch.Tensor | None, added: Added | None, how: Normalizing | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What `kernels.residual` asks for: sum, normalized tokens or their codes, and scales; empty where not wanted."""
    samples, tokens, width = x.shape
    every = tokens + (0 if second is None else second.shape[1])
    coding = how.coding if how else None
    total = torch.empty(x.shape if added else (0,), dtype=x.dtype, device=x.device)
    kind = DTYPES[coding.kind] if coding else x.dtype
    out = torch.empty((samples, every, width) if how else (0,), dtype=kind, device=x.device)
    scales = torch.empty((samples, every, 1) if coding else (0,), dtype=torch.float32, device=x.device)
    _launch(x, added, how, (total, out, scales), every, 0)
    if second is not None:
        _launch(second, None, how, (total, out, scales), every, tokens)
    return total, out, scales


def _launch(
    x: torch.Tensor, added: Added | None, how: Normalizing | None,
    made: tuple[torch.Tensor, torch.Tensor, torch.Tensor], every: int, offset: int,
) -> None:  # fmt: skip
    """Run the kernel on one stream."""
    samples, tokens, width = x.shape
    x = by_row(x)
    y, gate = (by_row(added.value), _rows(added.gate)) if added else (None, None)
    after = added.after if added else None
    norm = how.norm if how else Norm("layer", 0.0)
    shift, scale, coding = (_rows(how.shift), _rows(how.scale), how.coding) if how else (None, None, None)
    y_strides = (y.stride(0), y.stride(1)) if y is not None else (0, 0)
    size = triton.next_power_of_2(width)
    token_kernel[(samples * tokens,)](
        x, y, gate, after.weight if after else None, norm.weight, norm.bias, shift, scale,
        coding.smooth if coding else None, *made, tokens, width, every, offset, x.stride(0), x.stride(1), *y_strides,
        *token_strides(gate), *token_strides(shift), *token_strides(scale), after.eps if after else 0.0, norm.eps,
        ADD=added is not None, AFTER=after is not None, NORM=how is not None, RMS=norm.kind == "rms",
        HALF=x.dtype == torch.float16, **coding_facts(coding), SIZE=size, num_warps=warps(size),
    )  # fmt: skip


def _rows(modulation: torch.Tensor | None) -> torch.Tensor | None:
    return None if modulation is None else by_row(modulation)


def coding_facts(coding: Coding | None) -> dict[str, bool | int]:
    """The constants of a kernel that say how a row is rounded."""
    two, fours = stages(coding.rotation) if coding else (False, 0)
    largest = 0 if coding is None else 127 if coding.kind == "int8" else 448
    return {"TWO": two, "FOURS": fours, "LARGEST": largest}
