"""SDXL: a U-Net with deep transformers at low resolution; size and pooled text enter with the timestep."""

from __future__ import annotations

from typing import Any

import torch

from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, UNetStages
from hasten.denoisers._inputs import normal, unet_time_inputs

__all__ = ["SDXL"]

_SIZES = 6
"""Numbers of the size conditioning: original height and width, crop top and left, target height and width."""


def _inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    pooled = config["projection_class_embeddings_input_dim"] - _SIZES * config["addition_time_embed_dim"]
    pixels = (8 * size.height, 8 * size.width)
    return {
        "sample": normal(generator, size.batch, config["in_channels"], size.height, size.width),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": normal(generator, size.batch, size.text_tokens, config["cross_attention_dim"]),
        "added_cond_kwargs": {
            "text_embeds": normal(generator, size.batch, pooled),
            "time_ids": torch.tensor([[*pixels, 0, 0, *pixels]]).repeat(size.batch, 1),
        },
    }


SDXL = DenoiserSpec(
    name="sdxl",
    model_class="UNet2DConditionModel",
    tiny={
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "transformer_layers_per_block": (1, 1, 2),
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": (2, 2, 2),  # this class reads it as the number of heads
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    },
    inputs=_inputs,
    latents="sample",
    unet=UNetStages(),
    repeated_blocks=("BasicTransformerBlock",),
    attention=("Attention",),
    modulation=("time_embedding.linear_?", "add_embedding.linear_?", "*.resnets.*.time_emb_proj"),
    timed=("*.resnets.*.time_emb_proj",),
    time_inputs=unet_time_inputs,
    released={
        "stable-diffusion-xl-base-1.0": Released(
            config={
                "sample_size": 128,
                "in_channels": 4,
                "out_channels": 4,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
                "block_out_channels": (320, 640, 1280),
                "layers_per_block": 2,
                "transformer_layers_per_block": (1, 2, 10),
                "cross_attention_dim": 2048,
                "attention_head_dim": (5, 10, 20),
                "use_linear_projection": True,
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 256,
                "projection_class_embeddings_input_dim": 2816,
            },
            width=1024,
            height=1024,
            steps=50,
            text_tokens=77,
            pipeline="StableDiffusionXLPipeline",
            source="https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0",
        )
    },
)
