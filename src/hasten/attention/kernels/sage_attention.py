"""SageAttention 1 and 2: scores from 8-bit numbers, with a scale for each block of a head's tokens.

Source: Zhang et al., "SageAttention", arXiv:2410.02367, and "SageAttention2", arXiv:2411.10958.
"""

from __future__ import annotations

from typing import Any

import torch

from hasten.attention.bias import Bias, LowerTriangular
from hasten.attention.call import AttentionCall
from hasten.attention.kernels.packages import Package, function
from hasten.attention.kernels.tools import padded
from hasten.core.packages import installed

SAGE = Package("sageattention", ("sageattention",), "pip install sageattention", "sageattn", "1.0.6")


_BLOCK = 64


def first_lacks(call: AttentionCall) -> str | None:
    """Version 1 counts the places after the last key of a block of 64 as keys whose score is 0."""
    if not installed(SAGE.distribution).startswith("1."):
        return None
    if call.bias == "BlockDiagonal":
        return "SageAttention 1 takes no BlockDiagonal of any lengths; version 2 does"
    rest = call.keys % _BLOCK
    return f"SageAttention 1 takes multiples of {_BLOCK} keys, not {call.keys}; version 2 takes any" if rest else None


def sage(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    """Whichever version is installed; version 1 takes head sizes 64, 96 and 128, version 2 takes 64 and 128."""
    first = installed(SAGE.distribution).startswith("1.")
    run = _first if first else _second
    return padded(run, (64, 96, 128) if first else (64, 128))(query, key, value, bias, dropout, scale)


def _first(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    # Version 1 subtracts the mean from the caller's keys in place, so it is done for it, on a copy.
    return _call(query, key - key.mean(2, keepdim=True), value, bias, scale, smooth_k=False)


def _second(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    return _call(query, key, value, bias, scale)


def _call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, scale: float | None, **more: Any
) -> torch.Tensor:
    causal = isinstance(bias, LowerTriangular)
    return function(SAGE)(query, key, value, tensor_layout="HND", is_causal=causal, sm_scale=scale, **more)
