"""Attention on float8 numbers with a scale per head: the rounding, and a plain rendering of what the kernels compute.

Follows Shah et al., "FlashAttention-3", arXiv:2407.08608, section 3.3, with a scale per sample and key head instead
of one per block. The rendering serves as reference for kernels, and shows on any device what they do to a picture.
"""

from __future__ import annotations

import math

import torch

from hasten.attention.bias import Bias, materialize
from hasten.attention.kernels.tools import additive, token_major
from hasten.kernels.coded_heads import CodedHeads

LARGEST = torch.finfo(torch.float8_e4m3fn).max
_ROWS = 1024
"""Queries at a time, so that the scores of a long sequence need not fit into memory."""
_WEIGHT_SCALE = 256.0
"""Softmax weights, 0 to 1, are rounded as numbers up to 256: float8 has few values below 1."""


def quantized(part: torch.Tensor, groups: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [batch, heads, tokens, size] to float8 (e4m3); return it with the scales [batch, groups] in float32.

    The largest number of each sample and group of heads becomes the largest float8 number.
    """
    grouped = part.unflatten(1, (groups, -1))
    scale = (grouped.abs().amax((2, 3, 4)).float() / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (grouped.float() / scale[:, :, None, None, None]).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).flatten(1, 2), scale


def rounded(part: torch.Tensor, groups: int) -> torch.Tensor:
    """`part` in float32 with the values that float8 can hold."""
    values, scale = quantized(part, groups)
    return values.float() * scale.repeat_interleave(part.shape[1] // groups, 1)[:, :, None, None]


def float8_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Attention computed plainly on numbers rounded to float8; memory grows with the keys, time is no concern."""
    mask = None if bias is None else _mask(bias, query, key)
    near, far, values = (rounded(part, key.shape[1]) for part in (query, key, value))
    return _attention(near, far, values, mask, scale).to(query.dtype)


def reference_codes(given: CodedHeads, scale: float | None) -> torch.Tensor:
    """The same on numbers that are float8 already, [batch, tokens, heads, size]."""
    near, far, values = token_major(*given.values())
    return _attention(near, far, values, None, scale).to(given.dtype).transpose(1, 2)


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float | None
) -> torch.Tensor:
    """On rounded numbers in float32, [batch, heads, tokens, size]."""
    near = query * (1 / math.sqrt(query.shape[3]) if scale is None else scale)
    far, values = (part.repeat_interleave(query.shape[1] // key.shape[1], 1) for part in (key, value))
    pieces = [
        _piece(near[:, :, start : start + _ROWS], far, values, _rows(mask, start))
        for start in range(0, query.shape[2], _ROWS)
    ]
    return torch.cat(pieces, 2)


def _mask(bias: Bias, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    seen = bias if isinstance(bias, torch.Tensor) else materialize(bias, query.shape[2], key.shape[2], query.device)
    mask = additive(seen, query.float(), key.shape[2])
    assert mask is not None
    return mask


def _rows(mask: torch.Tensor | None, start: int) -> torch.Tensor | None:
    if mask is None or mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., start : start + _ROWS, :]


def _piece(near: torch.Tensor, far: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    scores = near @ far.transpose(2, 3)
    scores = scores if mask is None else scores + mask
    highest = scores.amax(-1, keepdim=True)
    weights = (scores - highest.clamp_min(torch.finfo(torch.float32).min)).exp()
    coarse = (weights * _WEIGHT_SCALE).to(torch.float8_e4m3fn).float() / _WEIGHT_SCALE
    return coarse @ values / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
