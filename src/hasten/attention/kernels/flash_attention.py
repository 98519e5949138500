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
from hasten.attention.call import AttentionCall
from hasten.attention.kernels.packages import Package, function, load
from hasten.attention.kernels.reduction import Run
from hasten.attention.kernels.tools import from_a_row, in_a_row, offsets, padded, token_major
from hasten.kernels.coded_heads import CodedHeads, code_heads
from hasten.kernels.rotary import Heads

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


def wheel_lacks(call: AttentionCall) -> str | None:
    """What the wheel fa3-fwd (0.0.3) was built without; builds of `flash_attn_interface` have it."""
    if load(FLASH3).__name__ != FLASH3.modules[0]:
        return None
    if call.bias == "LocalFromBottomRight":
        return "the wheel fa3-fwd is built without windows; use flash2 or flex"
    return None


def wheel_lacks_half(call: AttentionCall) -> str | None:
    """The same for numbers of 16 bits."""
    if call.dtype == torch.float16 and load(FLASH3).__name__ == FLASH3.modules[0]:
        return "the wheel fa3-fwd is built without float16; use bfloat16 or another kernel"
    return wheel_lacks(call)


FLOAT8_SIZE = 16
"""Heads of float8 numbers are of multiples of this size."""


def flash3_float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """FlashAttention 3 on float8 numbers, with one scale for each sample and key head."""
    return padded(_float8, FLOAT8_SIZE)(query, key, value, bias, dropout, scale)


def _float8(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    near, far, values = token_major(query, key, value)
    given = code_heads([Heads(near, far, values)])
    near, far, values = token_major(given.query, given.key, given.value)
    scales = given.scales
    if isinstance(bias, BlockDiagonal):  # there each sequence has its scales
        scales = scales.repeat_interleave(len(bias.lengths), 1)
    return _call(FLASH3, near, far, values, bias, _asked(scales, scale), -1).to(query.dtype)


def flash3_codes(given: CodedHeads, scale: float | None) -> torch.Tensor:
    """FlashAttention 3 on numbers that are float8 already, [batch, tokens, heads, head size]."""
    found = _output(function(FLASH3)(given.query, given.key, given.value, **_asked(given.scales, scale)))
    return found.to(given.dtype)


def _asked(scales: torch.Tensor, scale: float | None) -> dict[str, Any]:
    names = ("q_descale", "k_descale", "v_descale")
    return {"softmax_scale": scale, **dict(zip(names, scales.unbind(), strict=True))}
