"""What several kernels need: other head sizes, other layouts, and where sequences begin."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from hasten.attention.bias import Bias, materialize
from hasten.attention.kernels.reduction import Run


def padded(run: Run, sizes: Sequence[int] | int) -> Run:
    """`run` on heads padded with zeros to one of the sizes or a multiple, which changes no score and no result."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
        scale: float | None,
    ) -> torch.Tensor:  # fmt: skip
        size, wanted = query.shape[3], _fitting(max(query.shape[3], value.shape[3]), sizes)
        if size == wanted == value.shape[3]:
            return run(query, key, value, bias, dropout, scale)
        near, far, values = (F.pad(part, (0, wanted - part.shape[3])) for part in (query, key, value))
        found = run(near, far, values, bias, dropout, 1 / math.sqrt(size) if scale is None else scale)
        return found[..., : value.shape[3]]

    return attend


def _fitting(size: int, sizes: Sequence[int] | int) -> int:
    if isinstance(sizes, int):
        return -(-size // sizes) * sizes
    return next((one for one in sizes if one >= size), size)


def token_major(*parts: torch.Tensor) -> list[torch.Tensor]:
    """Views [batch, tokens, heads, head size] of tensors [batch, heads, tokens, head size], and back."""
    return [part.transpose(1, 2) for part in parts]


def additive(bias: Bias | None, query: torch.Tensor, keys: int) -> torch.Tensor | None:
    """A bias as a tensor that is added to the scores, in the queries' type."""
    if bias is None:
        return None
    mask = bias if isinstance(bias, torch.Tensor) else materialize(bias, query.shape[2], keys, query.device)
    if mask.dtype is torch.bool:
        return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
    return mask.to(query.dtype)


@functools.lru_cache(maxsize=64)
def offsets(lengths: tuple[int, ...], batch: int, device: torch.device) -> torch.Tensor:
    """Where each sequence begins when the samples of a batch, each divided alike, are put in a row; and the end.

    Remembered, because the numbers have to be sent to the GPU, which waits for it.
    """
    starts = itertools.accumulate(lengths * batch, initial=0)
    return torch.tensor(list(starts), dtype=torch.int32, device=device)


def in_a_row(*parts: torch.Tensor) -> list[torch.Tensor]:
    """[batch, heads, tokens, size] as [batch * tokens, heads, size], all samples one after the other."""
    return [part.transpose(1, 2).flatten(0, 1) for part in parts]


def from_a_row(found: torch.Tensor, batch: int) -> torch.Tensor:
    """The inverse of `in_a_row`."""
    return found.unflatten(0, (batch, -1)).transpose(1, 2)
