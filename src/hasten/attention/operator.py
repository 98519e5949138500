"""The attention call as one PyTorch operator, so that compiled code reaches the chosen kernel and can be counted."""

from __future__ import annotations

from collections import Counter

import torch

from hasten.attention.kernels import KERNELS

calls: Counter[str] = Counter()
"""How often the operator ran each kernel in this process; readers compare two points in time."""


@torch.library.custom_op("hasten::attend", mutates_args=())
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    dropout: float, causal: bool, scale: float | None, grouped: bool, kernel: str,
) -> torch.Tensor:  # fmt: skip
    """Run attention with a named kernel; shapes [batch, heads, tokens, head size], result like `query`."""
    calls[kernel] += 1
    result = KERNELS[kernel].run(query, key, value, mask, dropout, causal, scale, grouped)
    return result.contiguous()


@attend.register_fake
def _shape_of_attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    dropout: float, causal: bool, scale: float | None, grouped: bool, kernel: str,
) -> torch.Tensor:  # fmt: skip
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
