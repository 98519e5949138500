"""Brings a description of what a query sees to the simplest equal one, so that kernels meet few cases.

What reaches a kernel: no bias, a tensor, `LowerTriangular` with as many queries as keys,
`LowerTriangularFromBottomRight` with fewer queries than keys, `LocalFromBottomRight`, and `BlockDiagonal` where the
kernel takes that itself. No matrix is made on the way.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from hasten.attention.bias import (
    Bias,
    BlockDiagonal,
    LocalFromBottomRight,
    LowerTriangular,
    LowerTriangularFromBottomRight,
)

Run = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bias | None, float, float | None], torch.Tensor]
_Simple = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Bias | None], torch.Tensor]


def reduced(run: Run, takes_blocks: bool) -> Run:
    """`run`, given only the cases that this module's text lists."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
        scale: float | None,
    ) -> torch.Tensor:  # fmt: skip
        def simple(near: torch.Tensor, far: torch.Tensor, values: torch.Tensor, seen: Bias | None) -> torch.Tensor:
            return run(near, far, values, seen, dropout, scale)

        match bias:
            case LowerTriangular():
                return _from_top_left(simple, query, key, value)
            case LowerTriangularFromBottomRight():
                return _from_bottom_right(simple, query, key, value)
            case LocalFromBottomRight():
                return _local(simple, query, key, value, bias)
            case BlockDiagonal() if len(bias.lengths) == 1:
                return simple(query, key, value, None)
            case BlockDiagonal() if not takes_blocks:
                return _by_blocks(simple, query, key, value, bias)
            case _:
                return simple(query, key, value, bias)

    return attend


def _from_top_left(run: _Simple, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Keys beyond the last query are never seen; queries beyond the last key see all."""
    queries, keys = query.shape[2], key.shape[2]
    both = min(queries, keys)
    first = run(query[:, :, :both], key[:, :, :both], value[:, :, :both], LowerTriangular())
    if queries == both:
        return first
    return torch.cat([first, run(query[:, :, both:], key, value, None)], 2)


def _from_bottom_right(run: _Simple, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The first queries see nothing where there are more queries than keys."""
    blind = max(0, query.shape[2] - key.shape[2])
    square = query.shape[2] >= key.shape[2]
    triangle = LowerTriangular() if square else LowerTriangularFromBottomRight()
    return F.pad(run(query[:, :, blind:], key, value, triangle), (0, 0, blind, 0))


def _local(
    run: _Simple, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: LocalFromBottomRight
) -> torch.Tensor:
    """Cut what no window reaches: the first queries may see nothing, the first keys may not be seen."""
    blind = max(0, query.shape[2] - key.shape[2] - bias.window_right)
    seeing = query[:, :, blind:]
    unseen = max(0, key.shape[2] - seeing.shape[2] - bias.window_left)
    if not seeing.shape[2]:
        return query.new_zeros((*query.shape[:3], value.shape[3]))
    return F.pad(run(seeing, key[:, :, unseen:], value[:, :, unseen:], bias), (0, 0, blind, 0))


def _by_blocks(
    run: _Simple, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: BlockDiagonal
) -> torch.Tensor:
    near, far, values = query.split(bias.lengths, 2), key.split(bias.key_lengths, 2), value.split(bias.key_lengths, 2)
    return torch.cat([run(*part, None) for part in zip(near, far, values, strict=True)], 2)
