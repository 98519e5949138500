"""Qwen-Image: its original names are those of diffusers; nunchaku fuses the projections."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hasten.formats.keys.naming import Naming, Rule, fused, renamed

_BLOCK = "transformer_blocks.#.attn"


def _nunchaku(names: Collection[str]) -> Sequence[Rule]:
    return (
        fused(f"{_BLOCK}.to_qkv.*", *(f"{_BLOCK}.to_{part}.*" for part in "qkv")),
        fused(f"{_BLOCK}.add_qkv_proj.*", *(f"{_BLOCK}.add_{part}_proj.*" for part in "qkv")),
        renamed("*", "*"),
    )


_MARKS = ("transformer_blocks.0.img_mod.1.weight", "txt_norm.weight")
NAMINGS = (
    Naming(
        architecture="qwen_image",
        scheme="nunchaku",
        marks=(*_MARKS, "transformer_blocks.0.attn.to_qkv.weight"),
        rules=_nunchaku,
    ),
    Naming(
        architecture="qwen_image",
        scheme="original",
        marks=_MARKS,
        prefixes=("model.diffusion_model.", "diffusion_model."),
        ignored=("__index_timestep_zero__",),
    ),
    Naming(
        architecture="qwen_image",
        scheme="diffusers",
        marks=_MARKS,
        prefixes=("",),
        ignored=("__index_timestep_zero__",),
    ),
)
"""Of Qwen-Image."""
