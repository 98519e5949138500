"""PixArt-alpha and -Sigma: one modulation for all blocks plus a table in each; text by cross-attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hasten.core.block import BlockPlan, Residual, Sublayer
from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, Stack
from hasten.denoisers._inputs import normal
from hasten.denoisers._plans import ZERO, gelu_feed_forward, is_gelu, modulated

__all__ = ["PIXART"]


def _inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    """The prompt fills three quarters of the text tokens; a mask excludes the rest, as in the pipelines."""
    mask = torch.ones(size.batch, size.text_tokens)
    mask[:, (3 * size.text_tokens + 3) // 4 :] = 0
    sizes = {
        "resolution": torch.tensor([[8.0 * size.height, 8.0 * size.width]]).repeat(size.batch, 1),
        "aspect_ratio": torch.full((size.batch, 1), size.height / size.width),
    }
    has_sizes = config.get("use_additional_conditions")
    if has_sizes is None:  # the class then decides by the size it was trained for
        has_sizes = config["sample_size"] == 128
    return {
        "hidden_states": normal(generator, size.batch, config["in_channels"], size.height, size.width),
        "encoder_hidden_states": normal(generator, size.batch, size.text_tokens, config["caption_channels"]),
        "encoder_attention_mask": mask,
        "timestep": torch.full((size.batch,), 500),
        "added_cond_kwargs": sizes if has_sizes else {"resolution": None, "aspect_ratio": None},
    }


def _indicator(block: nn.Module, given: Mapping[str, Any]) -> torch.Tensor:
    """What the first attention sees: `timestep` holds the modulation that all blocks share, plus the block's table."""
    module: Any = block
    picture = given["hidden_states"]
    shift, scale, *_ = (module.scale_shift_table[None] + given["timestep"].reshape(len(picture), 6, -1)).chunk(6, dim=1)
    return module.norm1(picture) * (1 + scale) + shift


def _modulation(block: nn.Module, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    module: Any = block
    parts = module.scale_shift_table[None] + given["timestep"].reshape(len(given["hidden_states"]), 6, -1)
    return dict(zip(ZERO, parts.unbind(1), strict=True))


def _plan(block: nn.Module) -> BlockPlan | None:
    module: Any = block
    usual = module.norm_type == "ada_norm_single" and module.attn2 is not None and module.pos_embed is None
    return _BLOCK if usual and is_gelu(module.ff) and not module.only_cross_attention else None


_BLOCK = BlockPlan(
    modulation=_modulation,
    sublayers=(
        Sublayer(module="attn1", residuals=(modulated(1, "norm1"),), given={"attention_mask": "attention_mask"}),
        Sublayer(
            module="attn2",
            residuals=(Residual(stream="hidden_states"),),
            given={"encoder_hidden_states": "encoder_hidden_states", "attention_mask": "encoder_attention_mask"},
        ),
        Sublayer(module="ff", residuals=(modulated(2, "norm2"),)),
    ),
    feed_forward=(gelu_feed_forward("ff"),),
    absent=("cross_attention_kwargs", "_chunk_size"),
)


def _time_inputs(model: nn.Module, given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """One linear makes the modulation of all blocks, from the embedding of timestep and size."""
    module: Any = model
    picture = given["hidden_states"]
    sizes = given.get("added_cond_kwargs") or {"resolution": None, "aspect_ratio": None}
    embedded = module.adaln_single.emb(given["timestep"], **sizes, batch_size=len(picture), hidden_dtype=picture.dtype)
    yield "adaln_single.linear", F.silu(embedded)


def _released(name: str, *, pixels: int, text_tokens: int, sizes: bool, pipeline: str) -> Released:
    return Released(
        config={
            "sample_size": pixels // 8,
            "num_layers": 28,
            "attention_head_dim": 72,
            "num_attention_heads": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "interpolation_scale": pixels // 512,
            "use_additional_conditions": sizes,
        },
        width=pixels,
        height=pixels,
        steps=20,
        text_tokens=text_tokens,
        pipeline=pipeline,
        source=f"https://huggingface.co/PixArt-alpha/{name}",
    )


PIXART = DenoiserSpec(
    name="pixart",
    model_class="PixArtTransformer2DModel",
    tiny={
        "sample_size": 16,
        "num_layers": 4,
        "attention_head_dim": 24,
        "num_attention_heads": 2,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "cross_attention_dim": 48,
        "caption_channels": 16,
        "use_additional_conditions": False,
    },
    inputs=_inputs,
    stacks=(
        Stack(
            path="transformer_blocks",
            block="BasicTransformerBlock",
            takes=("hidden_states",),
            returns=("hidden_states",),
            denoised="hidden_states",
            branches=("attn1", "attn2", "ff"),
            indicator=_indicator,
            plan=_plan,
        ),
    ),
    repeated_blocks=("BasicTransformerBlock",),
    attention=("Attention",),
    modulation=("adaln_single.emb.*.linear_?", "adaln_single.linear"),
    timed=("adaln_single.linear",),
    time_inputs=_time_inputs,
    released={
        "PixArt-XL-2-512x512": _released(
            "PixArt-XL-2-512x512", pixels=512, text_tokens=120, sizes=False, pipeline="PixArtAlphaPipeline"
        ),
        "PixArt-XL-2-1024-MS": _released(
            "PixArt-XL-2-1024-MS", pixels=1024, text_tokens=120, sizes=True, pipeline="PixArtAlphaPipeline"
        ),
        "PixArt-Sigma-XL-2-1024-MS": _released(
            "PixArt-Sigma-XL-2-1024-MS",
            pixels=1024,
            text_tokens=300,
            sizes=False,
            pipeline="PixArtSigmaPipeline",
        ),
    },
)
