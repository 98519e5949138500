"""FLUX.1: double-stream blocks (text beside picture), then single-stream blocks; guidance is embedded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hasten.core.block import AttentionPlan, Beside, BlockPlan, Sublayer
from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, Stack
from hasten.denoisers._inputs import grid_ids, normal, unpacked
from hasten.denoisers._plans import ZERO, for_text, gelu_feed_forward, is_gelu, modulated, named, of_text, with_batch

__all__ = ["FLUX"]


def _inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    height, width = size.height // 2, size.width // 2  # 2 x 2 latent pixels are packed into one token
    given = {
        "hidden_states": normal(generator, size.batch, height * width, config["in_channels"]),
        "encoder_hidden_states": normal(generator, size.batch, size.text_tokens, config["joint_attention_dim"]),
        "pooled_projections": normal(generator, size.batch, config["pooled_projection_dim"]),
        "timestep": torch.full((size.batch,), 0.5),
        "img_ids": grid_ids(height, width),
        "txt_ids": torch.zeros(size.text_tokens, 3),
    }
    if config.get("guidance_embeds"):
        given["guidance"] = torch.full((size.batch,), 3.5)
    return given


def _double_indicator(block: nn.Module, given: Mapping[str, Any]) -> torch.Tensor:
    """What the attention of a double-stream block sees of the picture."""
    return block.norm1(given["hidden_states"], emb=given["temb"])[0]  # pyright: ignore


def _single_indicator(block: nn.Module, given: Mapping[str, Any]) -> torch.Tensor:
    """What the attention of a single-stream block sees of the picture; the modulation acts on each token alone."""
    return block.norm(given["hidden_states"], emb=given["temb"])[0]  # pyright: ignore


def _rotations(rotary: Any) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    """Cosines and sines of all tokens, text first, each of them twice."""
    cosines, sines = rotary
    return [with_batch((cosines[:, ::2], sines[:, ::2]))]


def _double_modulation(block: nn.Module, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    module: Any = block
    time = F.silu(given["temb"])
    return named(ZERO, module.norm1.linear(time)) | for_text(named(ZERO, module.norm1_context.linear(time)))


def _single_modulation(block: nn.Module, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return named(ZERO[:3], block.norm.linear(F.silu(given["temb"])))  # pyright: ignore


def _attention(second: Any) -> AttentionPlan:
    return AttentionPlan(
        module="attn",
        processor="FluxAttnProcessor",
        second=second,
        rotary="image_rotary_emb",
        rotations=_rotations,
        absent=("attention_mask",),
    )


_DOUBLE = BlockPlan(
    modulation=_double_modulation,
    sublayers=(
        Sublayer(
            module="attn",
            residuals=(
                modulated(1, "norm1.norm", argument="hidden_states"),
                of_text(1, "norm1_context.norm", "encoder_hidden_states"),
            ),
            given={"image_rotary_emb": "image_rotary_emb"},
        ),
        Sublayer(module="ff", residuals=(modulated(2, "norm2"),)),
        Sublayer(module="ff_context", residuals=(of_text(2, "norm2_context"),)),
    ),
    attention=(_attention("first"),),
    feed_forward=(gelu_feed_forward("ff"), gelu_feed_forward("ff_context")),
    absent=("joint_attention_kwargs",),
)
_SINGLE = BlockPlan(
    modulation=_single_modulation,
    sublayers=(
        Sublayer(
            module="attn",
            residuals=(
                modulated(1, "norm.norm", stream="encoder_hidden_states", argument="hidden_states"),
                modulated(1, "norm.norm"),
            ),
            given={"image_rotary_emb": "image_rotary_emb"},
            joined=True,
            beside=Beside(enters="proj_mlp", activation="gelu_tanh", leaves="proj_out"),
        ),
    ),
    attention=(_attention("none"),),
    absent=("joint_attention_kwargs",),
)


def _double(block: nn.Module) -> BlockPlan | None:
    module: Any = block
    return _DOUBLE if is_gelu(module.ff) and is_gelu(module.ff_context) else None


def _single(block: nn.Module) -> BlockPlan | None:
    return _SINGLE if getattr(block.act_mlp, "approximate", "") == "tanh" else None


def _unpack(given: Mapping[str, Any]) -> torch.Tensor | None:
    """Ids are (picture, row, column) for each token; reference pictures have other numbers than 0."""
    ids = given["img_ids"]
    own = ids[..., 0].flatten() == 0
    rows, columns = (int(number) + 1 for number in (ids.reshape(-1, 3)[:, 1:] * own[:, None]).amax(0).tolist())
    return unpacked(given["hidden_states"], rows, columns)


def _time_inputs(model: nn.Module, given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """All adaptive norms take the same embedding of timestep, guidance and pooled text."""
    kind, guidance = given["hidden_states"].dtype, given.get("guidance")
    times = [value.to(kind) * 1000 for value in (given["timestep"], guidance) if value is not None]
    yield "*norm*.linear", F.silu(model.time_text_embed(*times, given["pooled_projections"]))  # pyright: ignore


def _released(name: str, *, guidance_embeds: bool, steps: int, text_tokens: int) -> Released:
    return Released(
        config={
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": guidance_embeds,
            "axes_dims_rope": (16, 56, 56),
        },
        width=1024,
        height=1024,
        steps=steps,
        text_tokens=text_tokens,
        pipeline="FluxPipeline",
        source=f"https://huggingface.co/black-forest-labs/{name}",
    )


FLUX = DenoiserSpec(
    name="flux",
    model_class="FluxTransformer2DModel",
    tiny={
        "patch_size": 1,
        "in_channels": 16,
        "num_layers": 3,
        "num_single_layers": 3,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 6, 6),
    },
    inputs=_inputs,
    stacks=(
        Stack(
            path="transformer_blocks",
            block="FluxTransformerBlock",
            takes=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            denoised="hidden_states",
            branches=("attn", "ff", "ff_context"),
            indicator=_double_indicator,
            plan=_double,
        ),
        Stack(
            path="single_transformer_blocks",
            block="FluxSingleTransformerBlock",
            takes=("hidden_states", "encoder_hidden_states"),
            returns=("encoder_hidden_states", "hidden_states"),
            denoised="hidden_states",
            branches=("proj_out",),  # projects attention and feed-forward together
            feeders={"proj_out": ("attn", "proj_mlp")},
            indicator=_single_indicator,
            plan=_single,
        ),
    ),
    repeated_blocks=("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    attention=("FluxAttention",),
    guidance="embedded",
    modulation=(
        "time_text_embed.*.linear_?",
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "single_transformer_blocks.*.norm.linear",
        "norm_out.linear",
    ),
    timed=("*norm*.linear",),
    time_inputs=_time_inputs,
    unpack=_unpack,
    released={
        "FLUX.1-dev": _released("FLUX.1-dev", guidance_embeds=True, steps=28, text_tokens=512),
        "FLUX.1-schnell": _released("FLUX.1-schnell", guidance_embeds=False, steps=4, text_tokens=256),
    },
)
