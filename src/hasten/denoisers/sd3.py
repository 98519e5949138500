"""Stable Diffusion 3 and 3.5: picture and text run side by side; the last block drops the text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hasten.core.block import AttentionPlan, BlockPlan, Sublayer
from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, Stack
from hasten.denoisers._inputs import normal
from hasten.denoisers._plans import ZERO, for_text, gelu_feed_forward, is_gelu, modulated, named, of_text

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


def _modulation(block: nn.Module, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Blocks with a second attention have three parts more for it; the last block only norms the text."""
    module: Any = block
    time = F.silu(given["temb"])
    picture = (*ZERO, "shift3", "scale3", "gate3") if module.use_dual_attention else ZERO
    text = ("scale1", "shift1") if module.context_pre_only else ZERO
    return named(picture, module.norm1.linear(time)) | for_text(named(text, module.norm1_context.linear(time)))


def _plan(block: nn.Module) -> BlockPlan | None:
    module: Any = block
    last = bool(module.context_pre_only)
    if not is_gelu(module.ff) or not (last or is_gelu(module.ff_context)):
        return None
    picture = modulated(1, "norm1.norm", argument="hidden_states")
    text = of_text(1, "norm1_context.norm", "encoder_hidden_states", gated=not last)
    joint = Sublayer(module="attn", residuals=(picture, text))
    dual = Sublayer(module="attn2", residuals=(modulated(3, "norm1.norm", argument="hidden_states", early=True),))
    feed_picture = Sublayer(module="ff", residuals=(modulated(2, "norm2"),))
    feed_text = Sublayer(module="ff_context", residuals=(of_text(2, "norm2_context"),))
    second = (dual,) if module.use_dual_attention else ()
    return BlockPlan(
        modulation=_modulation,
        sublayers=(joint, *second, feed_picture, *(() if last else (feed_text,))),
        attention=(_attention("attn", "last"), *([_attention("attn2", "none")] if second else [])),
        feed_forward=(gelu_feed_forward("ff"), *(() if last else (gelu_feed_forward("ff_context"),))),
        absent=("joint_attention_kwargs", "_chunk_size"),
        ends=("encoder_hidden_states",) if last else (),
    )


def _attention(module: str, second: Any) -> AttentionPlan:
    absent = ("attention_mask",)
    return AttentionPlan(module=module, processor="JointAttnProcessor2_0", second=second, absent=absent)


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
            plan=_plan,
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
