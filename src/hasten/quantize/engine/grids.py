"""Scales and zero points of groups: from their range, or shrunk where clipping the largest numbers costs less."""

from __future__ import annotations

import torch

from hasten.kernels.rounding import affine_grid, fitting_group, grouped, positive, symmetric_grid, with_scales
from hasten.kernels.weight import QuantizedWeight
from hasten.quantize.engine.gptq import Grid

SHRINK = tuple(1 - step / 20 for step in range(10))
"""Parts of the range that are tried: 1 down to 0.55."""
SCALES = torch.float16
"""Type in which scales are stored."""


def grid_of(matrix: torch.Tensor, bits: int, group: int, symmetric: bool, shrink: float = 1.0) -> Grid:
    """The grid that each group's range, or a part of it, makes, with scales as they are stored."""
    parts = grouped(matrix, fitting_group(matrix.shape[1], group)) * shrink
    scale, zero = symmetric_grid(parts, bits) if symmetric else affine_grid(parts, bits)
    return Grid(positive(scale.to(SCALES)), zero, bits)


def clipped_grid(matrix: torch.Tensor, second: torch.Tensor, bits: int, group: int, symmetric: bool) -> Grid:
    """For each group the part of its range with the least error of its share of the output (as AWQ's clipping).

    The error of a group's share is computed from the second moments within the group.
    """
    size = fitting_group(matrix.shape[1], group)
    moments = diagonal_blocks(second, size)
    best, least = grid_of(matrix, bits, group, symmetric), None
    for shrink in SHRINK:
        tried = grid_of(matrix, bits, group, symmetric, shrink)
        errors = group_errors(matrix - tried.nearest(matrix), moments)
        better = torch.ones_like(errors, dtype=torch.bool) if least is None else errors < least
        least = errors if least is None else torch.minimum(errors, least)
        best = _chosen(better, tried, best)
    return best


def _chosen(better: torch.Tensor, tried: Grid, best: Grid) -> Grid:
    zero = None if tried.zero is None or best.zero is None else torch.where(better, tried.zero, best.zero)
    return Grid(torch.where(better, tried.scale, best.scale), zero, best.bits)


def group_errors(change: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """The error of each output that the change of each group makes alone: [outputs, groups]."""
    parts = grouped(change, moments.shape[1]).transpose(0, 1)
    return ((parts @ moments) * parts).sum(2).mT


def diagonal_blocks(second: torch.Tensor, size: int) -> torch.Tensor:
    """The second moments within groups, [groups, size, size], from those within larger blocks.

    Where groups do not fit into blocks, only the diagonal is kept.
    """
    if second.shape[1] % size:
        power = second.diagonal(dim1=1, dim2=2).reshape(-1, size)
        return torch.diag_embed(power)
    inner = second.reshape(second.shape[0], second.shape[1] // size, size, -1, size)
    return inner.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(-1, size, size)


def in_codes(shape: torch.Size | tuple[int, ...], matrix: torch.Tensor, grid: Grid) -> QuantizedWeight:
    """A matrix of numbers near the grid, or on it, in codes."""
    return with_scales(shape, matrix, grid.bits, grid.scale, grid.zero)
