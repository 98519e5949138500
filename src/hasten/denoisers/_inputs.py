"""Random tensors that example inputs are made of, and how tokens make up a picture."""

from __future__ import annotations

import torch


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    """Standard normal float32 values on the CPU."""
    return torch.randn(shape, generator=generator)


def grid_ids(height: int, width: int) -> torch.Tensor:
    """Position of every token of a picture as (0, row, column), float32, shape [height * width, 3]."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).float()


def unpacked(tokens: torch.Tensor, rows: int, columns: int) -> torch.Tensor | None:
    """Tokens [batch, tokens, 4 * channels] of 2 x 2 latent pixels each, as [batch, channels, 2 * rows, 2 * columns].

    Tokens of reference pictures may follow; None when there are too few, or the channels cannot be shared out.
    """
    batch, count, width = tokens.shape
    if rows * columns > count or width % 4:
        return None
    grid = tokens[:, : rows * columns].reshape(batch, rows, columns, width // 4, 2, 2)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, width // 4, 2 * rows, 2 * columns)
