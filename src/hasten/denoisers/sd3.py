"""Stable Diffusion 3 and 3.5: picture and text run side by side; the last block drops the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, Stack
from hasten.denoisers._inputs import normal

__all__ = ["SD3"]


def _inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(generator, size.batch, config["in_channels"], size.height, size.width),
        "encoder_hidden_states": normal(generator, size.batch, size.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": normal(generator, size.batch, config["pooled_projection_dim"]),
        "timestep": torch.full((size.batch,), 500.0),
    }


def _indicator(block: nn.Module, given: Mapping[str, Any]) -> torch.Tensor:
    """What the joint attention sees of the picture."""
    return block.norm1(given["hidden_states"], emb=given["temb"])[0]  # pyright: ignore


def _time_inputs(model: nn.Module, given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """All adaptive norms take the same embedding of timestep and pooled text."""
    embedded = model.time_text_embed(given["timestep"], given["pooled_projections"])  # pyright: ignore
    yield "*norm*.linear", F.silu(embedded)


def _released(
    name: str, *, layers: int, max_size: int, qk_norm: str | None = None, dual: int = 0, steps: int = 28
) -> Released:
    """All releases have as many attention heads as layers, of 64 channels each."""
    return Released(
        config={
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": layers,
            "attention_head_dim": 64,
            "num_attention_heads": layers,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 64 * layers,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": max_size,
            "dual_attention_layers": tuple(range(dual)),
            "qk_norm": qk_norm,
        },
        width=1024,
        height=1024,
        steps=steps,
        text_tokens=333,  # 77 of CLIP and 256 of T5
        pipeline="StableDiffusion3Pipeline",
        source=f"https://huggingface.co/stabilityai/{name}",
    )


SD3 = DenoiserSpec(
    name="sd3",
    model_class="SD3Transformer2DModel",
    tiny={
        "sample_size": 16,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
        "pos_embed_max_size": 32,
        "dual_attention_layers": (0, 1),
        "qk_norm": "rms_norm",
    },
    inputs=_inputs,
    stacks=(
        Stack(
            path="transformer_blocks",
            block="JointTransformerBlock",
            takes=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            denoised="hidden_states",
            branches=("attn", "attn2", "ff", "ff_context"),
            indicator=_indicator,
        ),
    ),
    repeated_blocks=("JointTransformerBlock",),
    attention=("Attention",),
    modulation=(
        "time_text_embed.*.linear_?",
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "norm_out.linear",
    ),
    timed=("*norm*.linear",),
    time_inputs=_time_inputs,
    released={
        "stable-diffusion-3-medium": _released("stable-diffusion-3-medium-diffusers", layers=24, max_size=192),
        "stable-diffusion-3.5-medium": _released(
            "stable-diffusion-3.5-medium", layers=24, max_size=384, qk_norm="rms_norm", dual=13, steps=40
        ),
        "stable-diffusion-3.5-large": _released(
            "stable-diffusion-3.5-large", layers=38, max_size=192, qk_norm="rms_norm"
        ),
    },
)
