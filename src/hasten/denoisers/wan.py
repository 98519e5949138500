"""Wan 2.1 and 2.2: video transformer with cross-attention to the text; guidance by two calls a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hasten.core.block import AttentionPlan, BlockPlan, Residual, Sublayer
from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, Stack
from hasten.denoisers._inputs import normal
from hasten.denoisers._plans import ZERO, gelu_feed_forward, is_gelu, modulated

__all__ = ["WAN"]


def _inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    return {
        "hidden_states": normal(generator, size.batch, config["in_channels"], size.frames, size.height, size.width),
        "timestep": torch.full((size.batch,), 500),
        "encoder_hidden_states": normal(generator, size.batch, size.text_tokens, config["text_dim"]),
    }


def _indicator(block: nn.Module, given: Mapping[str, Any]) -> torch.Tensor:
    """The projected time embedding [batch, 6, width], as published: it depends on neither picture nor prompt."""
    return given["temb"]


def _rotations(rotary: Any) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Cosines and sines, [1, tokens, 1, size], each of them twice."""
    cosines, sines = rotary
    return [(cosines[:, :, 0, ::2], sines[:, :, 0, 1::2])]


def _modulation(block: nn.Module, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """[batch, channels] float32 each, or [batch, tokens, channels] where every token has its own timestep."""
    table: Any = block.scale_shift_table
    return dict(zip(ZERO, (table + given["temb"].float()).unbind(-2), strict=True))


def _plan(block: nn.Module) -> BlockPlan | None:
    """The cross-attention is normed only in some releases."""
    module: Any = block
    norm = "" if type(module.norm2) is nn.Identity else "norm2"
    return replace(_BLOCK, sublayers=_sublayers(norm)) if is_gelu(module.ffn) else None


def _sublayers(norm: str) -> tuple[Sublayer, ...]:
    text = {"encoder_hidden_states": "encoder_hidden_states"}
    return (
        Sublayer(module="attn1", residuals=(modulated(1, "norm1"),), given={"rotary_emb": "rotary_emb"}),
        Sublayer(module="attn2", residuals=(Residual(stream="hidden_states", norm=norm),), given=text),
        Sublayer(module="ffn", residuals=(modulated(2, "norm3"),)),
    )


_BLOCK = BlockPlan(
    modulation=_modulation,
    sublayers=_sublayers("norm2"),
    attention=(
        AttentionPlan(
            module="attn1",
            processor="WanAttnProcessor",
            rotary="rotary_emb",
            rotations=_rotations,
            across_heads=True,
            absent=("encoder_hidden_states", "attention_mask"),
        ),
    ),
    feed_forward=(gelu_feed_forward("ffn"),),
)


def _config(*, layers: int, heads: int, ffn: int, channels: int = 16) -> Config:
    return {
        "patch_size": (1, 2, 2),
        "num_attention_heads": heads,
        "attention_head_dim": 128,
        "in_channels": channels,
        "out_channels": channels,
        "text_dim": 4096,
        "freq_dim": 256,
        "ffn_dim": ffn,
        "num_layers": layers,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
    }


def _time_inputs(model: nn.Module, given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """One linear makes the modulation of all blocks, from the timestep, which each token may have its own of."""
    embedder: Any = model.condition_embedder
    time = given["timestep"]
    waves = embedder.timesteps_proj(time.flatten()).unflatten(0, time.shape)
    kind = next(embedder.time_embedder.parameters()).dtype
    embedded = embedder.time_embedder(waves.to(kind)).type_as(given["hidden_states"])
    yield "condition_embedder.time_proj", embedder.act_fn(embedded)


def _released(name: str, config: Config, *, width: int, height: int, steps: int, frames: int) -> Released:
    return Released(
        config=config,
        width=width,
        height=height,
        steps=steps,
        text_tokens=512,
        frames=frames,
        pipeline="WanPipeline",
        source=f"https://huggingface.co/Wan-AI/{name}-Diffusers",
    )


_SMALL = _config(layers=30, heads=12, ffn=8960)
_LARGE = _config(layers=40, heads=40, ffn=13824)
_FIVE = _config(layers=30, heads=24, ffn=14336, channels=48)

WAN = DenoiserSpec(
    name="wan",
    model_class="WanTransformer3DModel",
    tiny={
        "patch_size": (1, 2, 2),
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 16,
        "freq_dim": 32,
        "ffn_dim": 64,
        "num_layers": 4,
        "rope_max_seq_len": 64,
    },
    inputs=_inputs,
    stacks=(
        Stack(
            path="blocks",
            block="WanTransformerBlock",
            takes=("hidden_states",),
            returns=("hidden_states",),
            denoised="hidden_states",
            branches=("attn1", "attn2", "ffn"),
            indicator=_indicator,
            plan=_plan,
        ),
    ),
    repeated_blocks=("WanTransformerBlock",),
    attention=("WanAttention",),
    guidance="separate",
    frames_per_token=1,
    conditional="first",
    modulation=("condition_embedder.time_embedder.linear_?", "condition_embedder.time_proj"),
    timed=("condition_embedder.time_proj",),
    time_inputs=_time_inputs,
    released={
        "Wan2.1-T2V-1.3B": _released("Wan2.1-T2V-1.3B", _SMALL, width=832, height=480, steps=50, frames=81),
        "Wan2.1-T2V-14B": _released("Wan2.1-T2V-14B", _LARGE, width=1280, height=720, steps=50, frames=81),
        "Wan2.2-T2V-A14B": _released("Wan2.2-T2V-A14B", _LARGE, width=1280, height=720, steps=40, frames=81),
        "Wan2.2-TI2V-5B": _released("Wan2.2-TI2V-5B", _FIVE, width=1280, height=704, steps=50, frames=121),
    },
)
