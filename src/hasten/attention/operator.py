"""The attention call as one PyTorch operator, so that compiled code reaches the chosen kernel and can be counted."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F

from hasten.attention.bias import Bias, LowerTriangular, decoded, encoded
from hasten.attention.call import AttentionCall
from hasten.attention.choosing import BEST, CHOICES, best, chosen, served
from hasten.attention.kernels import KERNELS

Calls = Counter[tuple[str, AttentionCall]]
"""How often a kernel, or a choice by measurement, was asked for each kind of call."""
SERVE_ALL = -1
"""For `least`: every call goes to the kernel, or raises."""
PLAIN = "left to PyTorch"
"""The name under which calls are counted that went to no kernel of ours."""

calls: Calls = Counter()
"""Calls of the operator in this process; readers compare two points in time."""


def compute(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None, asked: str, least: int = SERVE_ALL, counted: Calls | None = None,
) -> torch.Tensor:  # fmt: skip
    """Run the kernel asked for by name, or the one that measurement or rank chooses, and count the call.

    With `least`, calls with fewer keys and those that no kernel asked for takes are left to PyTorch, and counted so.
    """
    call = AttentionCall.of(query, key, value, bias, dropout)
    if least != SERVE_ALL and (call.keys < least or not served(asked, call)):
        name, found = PLAIN, _plain(query, key, value, bias, dropout, scale)
    else:
        name = asked
        kernel = _kernel(asked, call, query, key, value, bias, dropout, scale)
        found = KERNELS[kernel](query, key, value, bias, dropout, scale, call)
    if counted is not None:
        counted[name, call] += 1
    return found


def _kernel(asked: str, call: AttentionCall, *given: Any) -> str:
    if asked in CHOICES:
        return chosen(asked, call, *given).kernel
    return best(call) if asked == BEST else asked


def _plain(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None,
) -> torch.Tensor:  # fmt: skip
    causal = isinstance(bias, LowerTriangular)
    mask = bias if isinstance(bias, torch.Tensor) else None
    grouped = query.shape[1] != key.shape[1]
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, causal, scale=scale, enable_gqa=grouped)


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
    scale: float | None, asked: str, least: int = SERVE_ALL, counted: Calls | None = None,
) -> torch.Tensor:  # fmt: skip
    """Like `compute`, but through the operator where code is being compiled."""
    if not torch.compiler.is_compiling():
        return compute(query, key, value, bias, dropout, scale, asked, least, counted)
    mask = bias if isinstance(bias, torch.Tensor) else None
    kind, numbers = encoded(None if isinstance(bias, torch.Tensor) else bias)
    return attend(query, key, value, mask, dropout, scale, kind, numbers, asked, least)


@torch.library.custom_op("hasten::attend", mutates_args=())
def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    scale: float | None, kind: str, numbers: list[int], asked: str, least: int,
) -> torch.Tensor:  # fmt: skip
    """Attention on [batch, heads, tokens, head size], with a mask or an encoded description; result like `query`."""
    bias: Bias | None = decoded(kind, numbers) if mask is None else mask
    return compute(query, key, value, bias, dropout, scale, asked, least, calls).contiguous()


@attend.register_fake
def _shape_of_attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    scale: float | None, kind: str, numbers: list[int], asked: str, least: int,
) -> torch.Tensor:  # fmt: skip
    return query.new_empty((*query.shape[:-1], value.shape[-1]))
