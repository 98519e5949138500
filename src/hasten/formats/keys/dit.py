"""DiT and PixArt in diffusers' names, the only ones that are read."""

from __future__ import annotations

from hasten.formats.keys.naming import Naming

NAMINGS = (
    Naming(
        architecture="pixart",
        scheme="diffusers",
        marks=("adaln_single.linear.weight", "caption_projection.linear_1.weight", "pos_embed.proj.weight"),
    ),
    Naming(
        architecture="dit",
        scheme="diffusers",
        marks=("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight", "proj_out_1.weight"),
    ),
)
"""Of DiT and PixArt."""
