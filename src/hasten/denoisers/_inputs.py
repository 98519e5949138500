"""Random tensors that example inputs are made of."""

from __future__ import annotations

import torch


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal float32 values on the CPU."""
    return torch.randn(shape, generator=generator)


def grid_ids(height: int, width: int) -> torch.Tensor:
    """Position of every token of a picture as (0, row, column), float32, shape [height * width, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()
