"""Random tensors that example inputs are made of, how tokens make up a picture, and what U-Nets share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


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


def unet_time_inputs(model: nn.Module, given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """All residual blocks of a U-Net take the same embedding of timestep, size and pooled text."""
    module: Any = model
    picture = given["sample"]
    waves = module.get_time_embed(sample=picture, timestep=given["timestep"])
    embedded = module.time_embedding(waves, given.get("timestep_cond"))
    if module.config.addition_embed_type == "text_time":
        embedded = embedded + module.get_aug_embed(embedded, None, given["added_cond_kwargs"])
    if module.time_embed_act is not None:
        embedded = module.time_embed_act(embedded)
    yield "*.resnets.*.time_emb_proj", F.silu(embedded)
