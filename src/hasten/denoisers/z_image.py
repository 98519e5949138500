"""Z-Image: picture and text are refined apart, then run as one stream; pictures and prompts come as lists."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hasten.core.block import AttentionPlan, BlockPlan, FeedForwardPlan, Residual, Sublayer
from hasten.core.spec import Config, DenoiserSpec, InputSize, Released, Stack
from hasten.denoisers._inputs import normal
from hasten.denoisers._plans import named, pairs

__all__ = ["Z_IMAGE"]


def _inputs(config: Config, size: InputSize, generator: torch.Generator) -> dict[str, Any]:
    """The model pads the tokens of each picture and of each prompt to a multiple of 32."""
    latent = (config["in_channels"], size.frames, size.height, size.width)
    text = (size.text_tokens, config["cap_feat_dim"])
    return {
        "x": [normal(generator, *latent) for _ in range(size.batch)],
        "t": torch.full((size.batch,), 0.5),
        "cap_feats": [normal(generator, *text) for _ in range(size.batch)],
    }


def _indicator(block: nn.Module, given: Mapping[str, Any]) -> torch.Tensor:
    """What the attention sees, scaled by the timestep (of the noisy tokens where clean ones are given beside them)."""
    module: Any = block
    time = given["adaln_input"] if given.get("noise_mask") is None else given["adaln_noisy"]
    scale = 1.0 + module.adaLN_modulation(time).unsqueeze(1).chunk(4, dim=2)[0]
    return module.attention_norm1(given["x"]) * scale


def _rotations(rotary: Any) -> list[tuple[torch.Tensor, torch.Tensor] | None]:
    return [pairs(rotary)]


def _modulation(block: nn.Module, given: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Scales and gates of attention and feed-forward; there are no shifts."""
    made: torch.Tensor = block.adaLN_modulation(given["adaln_input"])  # pyright: ignore
    parts = named(("scale1", "gate1", "scale2", "gate2"), made)
    return parts | {name: parts[name].tanh() for name in ("gate1", "gate2")}


def _plan(block: nn.Module) -> BlockPlan:
    """The blocks that refine the text are not modulated."""
    return _BLOCK if block.modulation else _UNMODULATED


def _residual(number: int, norm: str, after: str, modulated: bool) -> Residual:
    scale, gate = (f"scale{number}", f"gate{number}") if modulated else ("", "")
    return Residual(stream="x", norm=norm, after=after, scale=scale, gate=gate)


def _sublayers(modulated: bool) -> tuple[Sublayer, ...]:
    attention = _residual(1, "attention_norm1", "attention_norm2", modulated)
    feed_forward = _residual(2, "ffn_norm1", "ffn_norm2", modulated)
    more = {"attention_mask": "attn_mask", "freqs_cis": "freqs_cis"}
    return (
        Sublayer(module="attention", residuals=(attention,), given=more),
        Sublayer(module="feed_forward", residuals=(feed_forward,)),
    )


_UNMODULATED = BlockPlan(
    sublayers=_sublayers(False),
    attention=(
        AttentionPlan(
            module="attention",
            processor="ZSingleStreamAttnProcessor",
            rotary="freqs_cis",
            rotations=_rotations,
            mask="attention_mask",
            absent=("encoder_hidden_states",),
        ),
    ),
    feed_forward=(FeedForwardPlan(module="feed_forward", enters=("w1", "w3"), activation="swiglu", leaves="w2"),),
    absent=("noise_mask",),
)
_BLOCK = replace(_UNMODULATED, sublayers=_sublayers(True), modulation=_modulation)


def _time_inputs(model: nn.Module, given: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """All blocks take the same embedding of the timestep; with clean pictures beside noisy ones there are two."""
    module: Any = model
    if isinstance(given["x"][0], list):
        return
    embedded = module.t_embedder(given["t"] * module.t_scale).type_as(given["x"][0])
    yield "noise_refiner.*.adaLN_modulation.0", embedded
    yield "layers.*.adaLN_modulation.0", embedded
    yield "all_final_layer.*.adaLN_modulation.1", F.silu(embedded)


def _released(name: str, *, steps: int) -> Released:
    return Released(
        config={
            "all_patch_size": (2,),
            "all_f_patch_size": (1,),
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "norm_eps": 1e-5,
            "qk_norm": True,
            "cap_feat_dim": 2560,
            "rope_theta": 256.0,
            "t_scale": 1000.0,
            "axes_dims": (32, 48, 48),
            "axes_lens": (1536, 512, 512),
        },
        width=1024,
        height=1024,
        steps=steps,
        text_tokens=512,  # the longest prompt; a shorter one is not padded to it
        pipeline="ZImagePipeline",
        source=f"https://huggingface.co/Tongyi-MAI/{name}",
    )


Z_IMAGE = DenoiserSpec(
    name="z_image",
    model_class="ZImageTransformer2DModel",
    tiny={
        "all_patch_size": (2,),
        "all_f_patch_size": (1,),
        "in_channels": 4,
        "dim": 32,
        "n_layers": 4,
        "n_refiner_layers": 2,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 16,
        "axes_dims": (4, 6, 6),
        "axes_lens": (256, 64, 64),
    },
    inputs=_inputs,
    stacks=(
        Stack(
            path="layers",
            block="ZImageTransformerBlock",
            takes=("x",),
            returns=("x",),
            denoised="x",
            branches=("attention", "feed_forward"),
            indicator=_indicator,
            plan=_plan,
        ),
    ),
    repeated_blocks=("ZImageTransformerBlock",),
    attention=("Attention",),
    conditional="first",
    modulation=(
        "t_embedder.mlp.?",
        "noise_refiner.*.adaLN_modulation.0",
        "layers.*.adaLN_modulation.0",
        "all_final_layer.*.adaLN_modulation.1",
    ),
    timed=("noise_refiner.*.adaLN_modulation.0", "layers.*.adaLN_modulation.0", "all_final_layer.*.adaLN_modulation.1"),
    time_inputs=_time_inputs,
    timestep="t",
    sign=-1,
    latents="x",
    released={
        "Z-Image": _released("Z-Image", steps=50),
        "Z-Image-Turbo": _released("Z-Image-Turbo", steps=8),
    },
)
