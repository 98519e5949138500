"""From numbers to the fields of ggml's simple blocks: bit for bit what the reference of the `gguf` package makes.

Each function takes blocks of numbers, float32 [n, block]. The importance of numbers plays no part in these types.
"""

from __future__ import annotations

import torch

from hasten.formats.gguf.bits import negated
from hasten.formats.gguf.blocks import Blocks

E2M1_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)


def round_around_zero(values: torch.Tensor, bits: int) -> Blocks:
    """Q4_0 and Q5_0: the number of the greatest magnitude becomes the least code."""
    half = 1 << bits - 1
    place = values.abs().argmax(1, keepdim=True)
    scale = values.gather(1, place) / -half
    codes = (values * _inverse(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1)
    return Blocks(codes.to(torch.uint8), scale.half())


def round_from_minimum(values: torch.Tensor, bits: int) -> Blocks:
    """Q4_1 and Q5_1: the range of the block, cut into equal steps."""
    top = (1 << bits) - 1
    low, high = values.aminmax(dim=1, keepdim=True)
    scale = (high - low) / top
    codes = ((values - low) * _inverse(scale) + 0.5).trunc().clamp(0, top)
    return Blocks(codes.to(torch.uint8), scale.half(), minimum=negated(low.half()))


def round_bytes(values: torch.Tensor) -> Blocks:
    """Q8_0: halves are rounded away from zero."""
    scale = values.abs().amax(1, keepdim=True) / 127
    return Blocks(_away(values * _inverse(scale)).to(torch.int8), scale.half())


def round_ternary(values: torch.Tensor) -> Blocks:
    """TQ1_0 and TQ2_0: -1, 0 or 1 times the greatest magnitude."""
    scale = values.abs().amax(1, keepdim=True)
    return Blocks((_away(values * _inverse(scale)) + 1).to(torch.uint8), scale.half())


def round_mxfp4(values: torch.Tensor) -> Blocks:
    """MXFP4: the exponent of the greatest magnitude, and the nearest 4-bit floats."""
    from hasten.formats.gguf.types import E8M0

    greatest = values.abs().amax(1, keepdim=True)
    exponent = torch.where(greatest > 0, greatest.log2().floor() + 125, 0).clamp(0, 254).to(torch.uint8)
    return Blocks(_nearest_e2m1(values, E8M0.to(values.device)[exponent.int()]), exponent)


def round_nvfp4(values: torch.Tensor) -> Blocks:
    """NVFP4: a scale in e4m3 for each 16 numbers (the greatest becomes 6), and the nearest 4-bit floats."""
    from hasten.formats.gguf.types import UE4M3

    groups = values.reshape(-1, 16)
    scale = (groups.abs().amax(1, keepdim=True) / 6).clamp(max=448).to(torch.float8_e4m3fn).view(torch.uint8)
    codes = _nearest_e2m1(groups, UE4M3.to(values.device)[scale.int()])
    return Blocks(codes.reshape(values.shape), scale.reshape(len(values), 4))


def _nearest_e2m1(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Codes of the nearest multiples of the scale; of two that are equally near, the first."""
    codes = torch.zeros_like(values, dtype=torch.uint8)
    least = values.abs()
    for code, level in enumerate(E2M1_LEVELS):
        error = (scale * level - values).abs()
        codes = torch.where(error < least, code, codes)
        least = torch.minimum(error, least)
    return codes.to(torch.uint8)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 0.0, 1 / scale)


def _away(values: torch.Tensor) -> torch.Tensor:
    size = values.abs()
    floor = size.floor()
    return values.sign() * (floor + (2 * (size - floor)).floor())
