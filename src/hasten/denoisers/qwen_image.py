"""Qwen-Image: 60 double-stream blocks (text beside picture); guidance by two calls a step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hasten.core.block import AttentionPlan, BlockPlan, Sublayer
from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, Stack
from hasten.denoisers._inputs import normal, unpacked
from hasten.denoisers._plans import (
    ZERO,
    for_text,
    gelu_feed_forward,
    is_gelu,
    modulated,
    named,
    of_text,
    pairs,
    with_batch,
)

__all__ = ["QWEN_IMAGE"]


def _inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    height, width = size.height // 2, size.width // 2  # 2 x 2 latent pixels are packed into one token
    return {
        "hidden_states": normal(generator, size.batch, height * width, config["in_channels"]),
        "encoder_hidden_states": normal(generator, size.batch, size.text_tokens, config["joint_attention_dim"]),
        "encoder_hidden_states_mask": None,  # what the pipeline passes when every token is real
        "timestep": torch.full((size.batch,), 0.5),
        "img_shapes": [[(1, height, width)]] * size.batch,
    }


def _indicator(block: nn.Module, given: Mapping[str, Any]) -> torch.Tensor:
    """What the joint attention sees of the picture."""
    module: Any = block
    modulation = module.img_mod(given["temb"]).chunk(2, dim=-1)[0]
    return module._modulate(module.img_norm1(given["hidden_states"]), modulation, given.get("modulate_index"))[0]


def _rotations(rotary: Any) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Picture and text have their own, in the order of the attention's streams."""
    return [with_batch(pairs(waves)) for waves in rotary]


def _modulation(block: nn.Module, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    module: Any = block
    return named(ZERO, module.img_mod(given["temb"])) | for_text(named(ZERO, module.txt_mod(given["temb"])))


def _plan(block: nn.Module) -> BlockPlan | None:
    """Not for models that edit pictures, which modulate the given pictures' tokens otherwise than the new one's."""
    module: Any = block
    return None if module.zero_cond_t or not is_gelu(module.img_mlp) or not is_gelu(module.txt_mlp) else _BLOCK


_BLOCK = BlockPlan(
    modulation=_modulation,
    sublayers=(
        Sublayer(
            module="attn",
            residuals=(
                modulated(1, "img_norm1", argument="hidden_states"),
                of_text(1, "txt_norm1", "encoder_hidden_states"),
            ),
            given={
                "encoder_hidden_states_mask": "encoder_hidden_states_mask",
                "image_rotary_emb": "image_rotary_emb",
            },
        ),
        Sublayer(module="img_mlp", residuals=(modulated(2, "img_norm2"),)),
        Sublayer(module="txt_mlp", residuals=(of_text(2, "txt_norm2"),)),
    ),
    attention=(
        AttentionPlan(
            module="attn",
            processor="QwenDoubleStreamAttnProcessor2_0",
            second="first",
            rotary="image_rotary_emb",
            rotations=_rotations,
            absent=("encoder_hidden_states_mask", "attention_mask"),
        ),
    ),
    feed_forward=(gelu_feed_forward("img_mlp"), gelu_feed_forward("txt_mlp")),
    absent=("joint_attention_kwargs", "modulate_index"),
)


def _unpack(given: Mapping[str, Any]) -> torch.Tensor | None:
    """Shapes are (frames, rows, columns) in tokens; an edited picture's own shape comes first in a list of several."""
    shapes = given["img_shapes"]
    shape = shapes[0] if isinstance(shapes[0], tuple) else shapes[0][0]
    return unpacked(given["hidden_states"], *shape[1:]) if shape[0] == 1 else None


def _time_inputs(model: nn.Module, given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """All blocks take the same embedding; models that edit pictures embed time 0, for the given pictures, as well."""
    module: Any = model
    time = given["timestep"].to(given["hidden_states"].dtype)
    times = torch.cat([time, time * 0]) if module.zero_cond_t else time
    guidance = () if given.get("guidance") is None else (given["guidance"].to(time.dtype) * 1000,)
    embedded = module.time_text_embed(times, *guidance, given["hidden_states"], given.get("additional_t_cond"))
    yield "transformer_blocks.*_mod.1", F.silu(embedded)
    yield "norm_out.linear", F.silu(embedded[: len(time)])


QWEN_IMAGE = DenoiserSpec(
    name="qwen_image",
    model_class="QwenImageTransformer2DModel",
    tiny={
        "patch_size": 2,
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "axes_dims_rope": (4, 6, 6),
    },
    inputs=_inputs,
    stacks=(
        Stack(
            path="transformer_blocks",
            block="QwenImageTransformerBlock",
            takes=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            denoised="hidden_states",
            branches=("attn", "img_mlp", "txt_mlp"),
            indicator=_indicator,
            plan=_plan,
        ),
    ),
    repeated_blocks=("QwenImageTransformerBlock",),
    attention=("Attention",),
    guidance="separate",
    conditional="first",
    modulation=(
        "time_text_embed.timestep_embedder.linear_?",
        "transformer_blocks.*.img_mod.1",
        "transformer_blocks.*.txt_mod.1",
        "norm_out.linear",
    ),
    timed=("transformer_blocks.*_mod.1", "norm_out.linear"),
    time_inputs=_time_inputs,
    unpack=_unpack,
    released={
        "Qwen-Image": Released(
            config={
                "patch_size": 2,
                "in_channels": 64,
                "out_channels": 16,
                "num_layers": 60,
                "attention_head_dim": 128,
                "num_attention_heads": 24,
                "joint_attention_dim": 3584,
                "guidance_embeds": False,
                "axes_dims_rope": (16, 56, 56),
            },
            width=1328,
            height=1328,
            steps=50,
            text_tokens=512,  # the longest prompt; a shorter one is not padded to it
            pipeline="QwenImagePipeline",
            source="https://huggingface.co/Qwen/Qwen-Image",
        )
    },
)
