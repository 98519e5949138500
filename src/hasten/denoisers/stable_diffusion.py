"""Stable Diffusion 1.x and 2.x: a U-Net of residual convolutions with cross-attention to the text."""

from __future__ import annotations

from typing import Any

import torch

from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, UNetStages
from hasten.denoisers._inputs import normal, unet_time_inputs

__all__ = ["STABLE_DIFFUSION"]

_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")
_COMMON = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": _DOWN,
    "up_block_types": _UP,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}


def _inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    return {
        "sample": normal(generator, size.batch, config["in_channels"], size.height, size.width),
        "timestep": torch.tensor(500),
        "encoder_hidden_states": normal(generator, size.batch, size.text_tokens, config["cross_attention_dim"]),
    }


STABLE_DIFFUSION = DenoiserSpec(
    name="stable_diffusion",
    model_class="UNet2DConditionModel",
    tiny={
        "sample_size": 16,
        "in_channels": 4,
        "out_channels": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (16, 32, 32),
        "layers_per_block": 2,
        "norm_num_groups": 8,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,  # this class reads it as the number of heads
    },
    inputs=_inputs,
    latents="sample",
    unet=UNetStages(),
    repeated_blocks=("BasicTransformerBlock",),
    attention=("Attention",),
    modulation=("time_embedding.linear_?", "*.resnets.*.time_emb_proj"),
    timed=("*.resnets.*.time_emb_proj",),
    time_inputs=unet_time_inputs,
    released={
        "stable-diffusion-v1-5": Released(
            config={**_COMMON, "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
            width=512,
            height=512,
            steps=50,
            text_tokens=77,
            pipeline="StableDiffusionPipeline",
            source="https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5",
        ),
        "stable-diffusion-2-1": Released(
            config={
                **_COMMON,
                "sample_size": 96,
                "cross_attention_dim": 1024,
                "attention_head_dim": (5, 10, 20, 20),
                "use_linear_projection": True,
                "upcast_attention": True,
            },
            width=768,
            height=768,
            steps=50,
            text_tokens=77,
            pipeline="StableDiffusionPipeline",
            source="https://huggingface.co/stabilityai/stable-diffusion-2-1",
        ),
    },
)
