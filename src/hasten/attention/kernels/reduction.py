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


def reduced(run: Run, takes_blocks: bool) -> Run:
    """`run`, given only the cases that this module's text lists."""

    def attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias | None, dropout: float,
        scale: float | None,
    ) -> torch.Tensor:  # fmt: skip
        part = {LowerTriangular: _from_top_left, LowerTriangularFromBottomRight: _from_bottom_right,
                LocalFromBottomRight: _local, BlockDiagonal: _whole if takes_blocks else _by_blocks}  # fmt: skip
        return part.get(type(bias), _whole)(run, query, key, value, bias, dropout, scale)

    return attend


def _whole(
    run: Run, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias, *rest: float | None
) -> torch.Tensor:
    if isinstance(bias, BlockDiagonal) and len(bias.lengths) == 1:
        return run(query, key, value, None, *rest)  # pyright: ignore[reportArgumentType]
    return run(query, key, value, bias, *rest)  # pyright: ignore[reportArgumentType]


def _from_top_left(
    run: Run, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias, *rest: float | None
) -> torch.Tensor:
    """Keys beyond the last query are never seen; queries beyond the last key see all."""
    queries, keys = query.shape[2], key.shape[2]
    both = min(queries, keys)
    first = _whole(run, query[:, :, :both], key[:, :, :both], value[:, :, :both], LowerTriangular(), *rest)
    if queries == both:
        return first
    others = run(query[:, :, both:], key, value, None, *rest)  # pyright: ignore[reportArgumentType]
    return torch.cat([first, others], 2)


def _from_bottom_right(
    run: Run, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias, *rest: float | None
) -> torch.Tensor:
    """The first queries see nothing where there are more queries than keys."""
    blind = max(0, query.shape[2] - key.shape[2])
    square = query.shape[2] >= key.shape[2]
    seeing = _whole(run, query[:, :, blind:], key, value, LowerTriangular() if square else bias, *rest)
    return F.pad(seeing, (0, 0, blind, 0))


def _local(
    run: Run, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias, *rest: float | None
) -> torch.Tensor:
    """Cut what no window reaches: the first queries may see nothing, the first keys may not be seen."""
    assert isinstance(bias, LocalFromBottomRight)
    blind = max(0, query.shape[2] - key.shape[2] - bias.window_right)
    seeing = query[:, :, blind:]
    unseen = max(0, key.shape[2] - seeing.shape[2] - bias.window_left)
    if not seeing.shape[2]:
        return query.new_zeros((*query.shape[:3], value.shape[3]))
    found = _whole(run, seeing, key[:, :, unseen:], value[:, :, unseen:], bias, *rest)
    return F.pad(found, (0, 0, blind, 0))


def _by_blocks(
    run: Run, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: Bias, *rest: float | None
) -> torch.Tensor:
    assert isinstance(bias, BlockDiagonal)
    parts = zip(
        query.split(bias.lengths, 2), key.split(bias.key_lengths, 2), value.split(bias.key_lengths, 2), strict=True
    )
    return torch.cat([run(*part, None, *rest) for part in parts], 2)  # pyright: ignore[reportArgumentType]
