"""Activations rounded to 8 or 4 bits, token by token, while the model runs."""

from __future__ import annotations

from typing import Literal

import torch

from hasten.kernels.rounding import FLOAT8, fitting_group, grouped, positive
from hasten.kernels.weight import spread

Activations = Literal["none", "int8", "float8", "float8_block", "int4"]
"""What activations are rounded to before the product; "none" leaves them as they are."""
FLOAT8_BLOCK = 128
"""Numbers of a token that share a scale with "float8_block" (DeepSeek-V3, https://arxiv.org/abs/2412.19437)."""
INT4_GROUP = 64
"""Numbers that share a scale where activations have 4 bits (SVDQuant)."""


def int8_tokens(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each token to -127..127: codes, int8 [tokens, inputs], and scales, float32 [tokens, 1].

    The scale is computed in float32: activations of Z-Image exceed what float16 holds.
    """
    exact = values.float()
    scale = positive(exact.abs().amax(-1, keepdim=True) / 127)
    return (exact / scale).round().to(torch.int8), scale


def float8_tokens(values: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round each token to e4m3: codes [tokens, inputs] and scales, float32 [tokens, 1]; or with one given scale, []."""
    exact = values.float()
    largest = FLOAT8["float8_e4m3fn"]
    if scale is None:
        scale = positive(exact.abs().amax(-1, keepdim=True) / largest)
    return (exact / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale.float()


def float8_blocks(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round 128 numbers of a token at a time to e4m3: codes [tokens, inputs] and scales, float32 [tokens, groups]."""
    parts = grouped(values, fitting_group(values.shape[-1], FLOAT8_BLOCK))
    codes, scales = float8_tokens(parts)
    return codes.reshape(values.shape), scales.squeeze(-1)


def int4_tokens(values: torch.Tensor) -> torch.Tensor:
    """Round groups of 64 numbers of each token to -7..7, and return what these stand for, float32."""
    group = fitting_group(values.shape[-1], INT4_GROUP)
    parts = grouped(values.float(), group)
    scale = positive(parts.abs().amax(-1, keepdim=True) / 7)
    return ((parts / scale).round() * scale).reshape(values.shape)


def rounded(values: torch.Tensor, kind: Activations, scale: torch.Tensor | None = None) -> torch.Tensor:
    """What activations, [tokens, inputs], are worth after rounding; float32 unless they stay as they are."""
    if kind == "none":
        return values
    if kind == "int4":
        return int4_tokens(values)
    if kind == "float8_block":
        codes, scales = float8_blocks(values)
        return codes.float() * spread(scales, values.shape[-1])
    codes, scales = int8_tokens(values) if kind == "int8" else float8_tokens(values, scale)
    return codes.float() * scales
