"""FlashAttention 2, 3 and 4 from their own packages, and FlashAttention 3 on float8.

Sources: Dao, "FlashAttention-2", arXiv:2307.08691; Shah et al., "FlashAttention-3", arXiv:2407.08608.
"""

from __future__ import annotations

from typing import Any

import torch

from hasten.attention.bias import (
    Bias,
    BlockDiagonal,
    LocalFromBottomRight,
    LowerTriangular,
    LowerTriangularFromBottomRight,
)
from hasten.attention.kernels.float8 import quantized
from hasten.attention.kernels.packages import Package, function
from hasten.attention.kernels.reduction import Run
from hasten.attention.kernels.tools import from_a_row, in_a_row, offsets, padded, token_major

FLASH2 = Package("flash-attn", ("flash_attn",), "pip install flash-attn --no-build-isolation", "flash_attn_func", "2.6")
FLASH3 = Package("fa3-fwd", ("fa3_fwd_interface", "flash_attn_interface"), "pip install fa3-fwd", "flash_attn_func")
FLASH4 = Package("flash-attn-4", ("flash_attn.cute",), "pip install --pre flash-attn-4", "flash_attn_func")
DESCRIBED = frozenset(
    kind.__name__ for kind in (LowerTriangular, LowerTriangularFromBottomRight, LocalFromBottomRight, BlockDiagonal)
)


def flash(package: Package, *, open_window: int | None = -1, dropout: bool = False) -> Run:
    """The package's kernel; `open_window` is how it writes "no limit"."""

    def run(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, rate: float,
        scale: float | None,
    ) -> torch.Tensor:  # fmt: skip
        asked: dict[str, Any] = {"softmax_scale": scale} | ({"dropout_p": rate} if dropout else {})
        return _call(package, query, key, value, bias, asked, open_window)

    return padded(run, 8)


def _call(
    package: Package, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None,
    asked: dict[str, Any], open_window: int | None,
) -> torch.Tensor:  # fmt: skip
    if isinstance(bias, BlockDiagonal):
        kernel = function(package, "flash_attn_varlen_func")
        rows = in_a_row(query, key, value)
        return from_a_row(_output(kernel(*rows, **_sequences(bias, query), **asked)), len(query))
    if isinstance(bias, LocalFromBottomRight):
        asked["window_size"] = (bias.window_left, bias.window_right)
    else:
        asked["window_size"] = (open_window, open_window)
    causal = isinstance(bias, LowerTriangular | LowerTriangularFromBottomRight)
    return _output(function(package)(*token_major(query, key, value), causal=causal, **asked)).transpose(1, 2)


def _sequences(bias: BlockDiagonal, query: torch.Tensor) -> dict[str, Any]:
    return {
        "cu_seqlens_q": offsets(bias.lengths, len(query), query.device),
        "cu_seqlens_k": offsets(bias.key_lengths, len(query), query.device),
        "max_seqlen_q": max(bias.lengths),
        "max_seqlen_k": max(bias.key_lengths),
    }


def _output(found: Any) -> torch.Tensor:
    """Some releases return the softmax's normalizer beside the result."""
    return found[0] if isinstance(found, tuple) else found  # pyright: ignore[reportUnknownVariableType]


def flash3_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """FlashAttention 3 on float8 numbers, with one scale for each sample and key head."""
    groups = key.shape[1]
    (query8, query_scale), (key8, key_scale), (value8, value_scale) = (
        quantized(part, groups) for part in (query, key, value)
    )
    scales = [query_scale, key_scale, value_scale]
    if isinstance(bias, BlockDiagonal):  # there each sequence has its scales
        scales = [one.repeat_interleave(len(bias.lengths), 0) for one in scales]
    asked: dict[str, Any] = {"softmax_scale": scale}
    asked |= dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))
    return _call(FLASH3, query8, key8, value8, bias, asked, -1).to(query.dtype)
