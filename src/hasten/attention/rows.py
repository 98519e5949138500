"""The exact result of attention for a few of its queries, against which a kernel's result is checked."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from hasten.attention.bias import Bias

_ROWS = 64
"""How many queries are checked, spread over all of them; each sees every key, so no part of the input goes unread."""


def reference_error(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, scale: float | None,
    found: torch.Tensor,
) -> float:  # fmt: skip
    """Distance of a kernel's result from math attention in float32 (float64 for float64), relative to its norm.

    NaN when the result, anywhere, holds NaN or infinity.
    """
    if found.shape != (*query.shape[:3], value.shape[3]) or not bool(found.isfinite().all()):
        return float("nan")
    rows = torch.linspace(0, query.shape[2] - 1, min(_ROWS, query.shape[2]), device=query.device).long().unique()
    expected = reference(query, key, value, bias, scale, rows)
    difference = found[:, :, rows].to(expected.dtype) - expected
    return float(difference.norm() / expected.norm().clamp_min(torch.finfo(torch.float32).tiny))


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, scale: float | None,
    rows: torch.Tensor | None = None, dtype: torch.dtype | None = None,
) -> torch.Tensor:  # fmt: skip
    """Math attention for some (all) queries, from a matrix of what they see, in float32 or the wider given type."""
    exact = dtype or (torch.float64 if query.dtype == torch.float64 else torch.float32)
    chosen = torch.arange(query.shape[2], device=query.device) if rows is None else rows
    times = query.shape[1] // key.shape[1]
    near, far, values = (part.detach().to(exact) for part in (query[:, :, chosen], key, value))
    far, values = (part.repeat_interleave(times, 1) for part in (far, values))
    mask = _mask(bias, chosen, query.shape[2], key.shape[2], exact)
    with sdpa_kernel([SDPBackend.MATH]):
        return F.scaled_dot_product_attention(near, far, values, mask, scale=scale)


def _mask(bias: Bias | None, rows: torch.Tensor, queries: int, keys: int, exact: torch.dtype) -> torch.Tensor | None:
    if bias is None:
        return None
    if not isinstance(bias, torch.Tensor):
        return bias.seen(rows, queries, keys)
    part = bias if bias.dim() < 2 or bias.shape[-2] == 1 else bias[..., rows, :]
    return part if part.dtype == torch.bool else part.to(exact)
