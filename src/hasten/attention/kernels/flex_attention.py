"""PyTorch's FlexAttention: one kernel compiled for each description of what a query sees.

Source: Dong et al., "FlexAttention", arXiv:2412.05496.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from hasten.attention.bias import (
    Bias,
    BlockDiagonal,
    Described,
    LocalFromBottomRight,
    LowerTriangular,
    LowerTriangularFromBottomRight,
)
from hasten.attention.kernels.tools import additive


def flex(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Compiled on a GPU; on the CPU PyTorch's plain rendering of it, which is slow and makes a matrix."""
    queries, keys, device = query.shape[2], key.shape[2], query.device
    blocks = block_mask(bias, queries, keys, device) if isinstance(bias, Described) else None
    change = _adding(bias, query, key) if isinstance(bias, torch.Tensor) else None
    grouped = query.shape[1] != key.shape[1]
    with warnings.catch_warnings():
        # Said on the CPU at every call; here the plain rendering is what is wanted.
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        found: torch.Tensor = _kernel(device.type)(  # pyright: ignore[reportAssignmentType]
            query, key, value, score_mod=change, block_mask=blocks, scale=scale, enable_gqa=grouped
        )
    return found


@functools.cache
def _kernel(device: str) -> Callable[..., Any]:
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


@functools.lru_cache(maxsize=32)
def block_mask(bias: Described, queries: int, keys: int, device: torch.device) -> BlockMask:
    """Which blocks of 128 x 128 scores are needed, and the rule inside a block; remembered for equal calls."""
    compiled = device.type == "cuda"  # otherwise the whole matrix is made once
    return create_block_mask(_rule(bias, queries, keys, device), None, None, queries, keys, device, _compile=compiled)  # pyright: ignore[reportArgumentType]


def _rule(bias: Described, queries: int, keys: int, device: torch.device) -> Callable[..., torch.Tensor]:
    shift = keys - queries
    if isinstance(bias, BlockDiagonal):
        near, far = (_owners(sizes, device) for sizes in (bias.lengths, bias.key_lengths))
        return lambda b, h, q, k: near[q] == far[k]
    if isinstance(bias, LocalFromBottomRight):
        left, right = bias.window_left, bias.window_right
        return lambda b, h, q, k: (k - q - shift >= -left) & (k - q - shift <= right)
    if isinstance(bias, LowerTriangularFromBottomRight):
        return lambda b, h, q, k: k <= q + shift
    assert isinstance(bias, LowerTriangular)
    return lambda b, h, q, k: k <= q


def _owners(sizes: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.arange(len(sizes), device=device).repeat_interleave(torch.tensor(sizes, device=device))


def _adding(bias: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Callable[..., torch.Tensor]:
    mask = additive(bias, query, key.shape[2])
    assert mask is not None
    whole = mask.expand(len(query), query.shape[1], query.shape[2], key.shape[2])
    return lambda score, b, h, q, k: score + whole[b, h, q, k]
