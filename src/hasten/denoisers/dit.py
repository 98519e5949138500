"""DiT: class-conditional transformer; every block makes its own modulation from timestep and class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hasten.core.block import BlockPlan, Sublayer
from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, Stack
from hasten.denoisers._inputs import normal
from hasten.denoisers._plans import ZERO, gelu_feed_forward, is_gelu, modulated, named

__all__ = ["DIT"]


def _inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    """Height and width must be equal: the model unpatchifies to a square. There is no text."""
    return {
        "hidden_states": normal(generator, size.batch, config["in_channels"], size.height, size.width),
        "timestep": torch.full((size.batch,), 500),
        "class_labels": torch.randint(config["num_embeds_ada_norm"], (size.batch,), generator=generator),
    }


def _indicator(block: nn.Module, given: Mapping[str, Any]) -> torch.Tensor:
    """What the first attention sees: the picture, normalized and modulated by timestep and class."""
    picture = given["hidden_states"]
    return block.norm1(picture, given["timestep"], given["class_labels"], hidden_dtype=picture.dtype)[0]  # pyright: ignore


def _modulation(block: nn.Module, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Each block embeds timestep and class itself."""
    norm: Any = block.norm1
    kind = given["hidden_states"].dtype
    return named(ZERO, norm.linear(F.silu(norm.emb(given["timestep"], given["class_labels"], hidden_dtype=kind))))


def _plan(block: nn.Module) -> BlockPlan | None:
    module: Any = block
    usual = module.norm_type == "ada_norm_zero" and module.attn2 is None and module.pos_embed is None
    return _BLOCK if usual and is_gelu(module.ff) and not module.only_cross_attention else None


_BLOCK = BlockPlan(
    modulation=_modulation,
    sublayers=(
        Sublayer(module="attn1", residuals=(modulated(1, "norm1.norm"),), given={"attention_mask": "attention_mask"}),
        Sublayer(module="ff", residuals=(modulated(2, "norm3"),)),
    ),
    feed_forward=(gelu_feed_forward("ff"),),
    absent=("cross_attention_kwargs", "_chunk_size"),
)


def _time_inputs(model: nn.Module, given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """Every block embeds timestep and class itself; the output takes the first block's embedding."""
    module: Any = model
    kind = given["hidden_states"].dtype
    for index, block in enumerate(module.transformer_blocks):
        embedded = F.silu(block.norm1.emb(given["timestep"], given["class_labels"], hidden_dtype=kind))
        yield f"transformer_blocks.{index}.norm1.linear", embedded
        if index == 0:
            yield "proj_out_1", embedded


def _released(pixels: int) -> Released:
    return Released(
        config={
            "sample_size": pixels // 8,
            "num_layers": 28,
            "attention_head_dim": 72,
            "num_attention_heads": 16,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_zero",
            "norm_elementwise_affine": False,
        },
        width=pixels,
        height=pixels,
        steps=50,
        text_tokens=0,
        pipeline="DiTPipeline",
        source=f"https://huggingface.co/facebook/DiT-XL-2-{pixels}",
    )


DIT = DenoiserSpec(
    name="dit",
    model_class="DiTTransformer2DModel",
    tiny={
        "sample_size": 16,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "patch_size": 2,
        "in_channels": 4,
        "out_channels": 8,
        "num_embeds_ada_norm": 10,
    },
    inputs=_inputs,
    stacks=(
        Stack(
            path="transformer_blocks",
            block="BasicTransformerBlock",
            takes=("hidden_states",),
            returns=("hidden_states",),
            denoised="hidden_states",
            branches=("attn1", "ff"),
            indicator=_indicator,
            plan=_plan,
        ),
    ),
    repeated_blocks=("BasicTransformerBlock",),
    attention=("Attention",),
    conditional="first",
    modulation=(
        "transformer_blocks.*.norm1.emb.timestep_embedder.linear_?",
        "transformer_blocks.*.norm1.linear",
        "proj_out_1",
    ),
    timed=("transformer_blocks.*.norm1.linear", "proj_out_1"),
    time_inputs=_time_inputs,
    released={"DiT-XL-2-256": _released(256), "DiT-XL-2-512": _released(512)},
)
