"""Device functions of several kernels: rotation by Hadamard matrices, and rounding to 8 bits with a row's scale."""
# pyright: basic, reportMissingImports=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# ruff: noqa: ANN001, ANN201, ANN202, N803 - types of a kernel's arguments are Triton's; constants are in capitals

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _turn_four(values, SIZE: tl.constexpr, INNER: tl.constexpr):
    """The regular Hadamard matrix of order 4 on channels that are INNER apart: half the sum less the mirrored."""
    parts = tl.reshape(values, [SIZE // (4 * INNER), 4, INNER])
    mirrored = tl.flip(parts, 1)
    return tl.reshape(tl.sum(parts, 1, keep_dims=True) * 0.5 - mirrored, [SIZE])


@triton.jit
def _turn_two(values, SIZE: tl.constexpr):
    """The Hadamard matrix of order 2 on neighbouring channels."""
    even, odd = tl.split(tl.reshape(values, [SIZE // 2, 2]))
    return tl.reshape(tl.join(even + odd, even - odd), [SIZE]) * 0.7071067811865476


@triton.jit
def rotated(values, SIZE: tl.constexpr, TWO: tl.constexpr, FOURS: tl.constexpr):
    """`hadamard.rotate` of a row of SIZE channels in groups of 4**FOURS, or twice as many with TWO."""
    if TWO:
        values = _turn_two(values, SIZE)
    for stage in tl.static_range(FOURS):
        values = _turn_four(values, SIZE, (2 if TWO else 1) << (2 * stage))
    return values


@triton.jit
def nearest(values):
    """The nearest integer, ties to even, of numbers below 2**22."""
    return (values + 12582912.0) - 12582912.0


@triton.jit
def store_codes(values, out, scales, row, inside, LARGEST: tl.constexpr):
    """Round a row to -127..127 (LARGEST 127) or to e4m3 (LARGEST 448), and write codes and scale."""
    largest = tl.max(tl.abs(values), 0)
    scale = tl.where(largest > 0, largest / LARGEST, 1.0)
    tl.store(scales + row, scale)
    values = values / scale
    if LARGEST == 127:
        codes = nearest(values).to(tl.int8)
    else:
        codes = tl.minimum(tl.maximum(values, -LARGEST), LARGEST).to(tl.float8e4nv)
    tl.store(out, codes, mask=inside)


def stages(rotation: int) -> tuple[bool, int]:
    """Of a group of channels: is there a factor of order 2, and how many of order 4?"""
    order = rotation.bit_length() - 1
    return bool(order % 2), order // 2


def by_row(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with its channels side by side, as kernels read them; models hand over transposed pictures."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def token_strides(modulation: torch.Tensor | None) -> tuple[int, int]:
    """Strides by sample and by token of a modulation, [batch, channels] or [batch, 1 or tokens, channels]."""
    if modulation is None:
        return 0, 0
    sample = modulation.stride(0) if modulation.shape[0] > 1 else 0
    return sample, modulation.stride(1) if modulation.dim() == 3 and modulation.shape[1] > 1 else 0


def warps(size: int) -> int:
    """Warps of a program that holds a row of `size` channels: 16 or more channels a thread, 16 warps at most."""
    return max(1, min(16, size // 512))
