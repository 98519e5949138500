"""The VAE of Stable Diffusion, SDXL, SD3 and FLUX (AutoencoderKL): names of the latent diffusion repository."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from hasten.formats.keys.joins import Pointwise
from hasten.formats.keys.naming import Naming, Rule, renamed

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def _rules(names: Collection[str]) -> Sequence[Rule]:
    numbers = (
        re.match(r"(?:encoder\.down|encoder\.down_blocks|decoder\.up|decoder\.up_blocks)\.(\d+)\.", n) for n in names
    )
    return tuple(_all(1 + max((int(match[1]) for match in numbers if match), default=0)))


def _all(levels: int) -> Iterator[Rule]:
    yield renamed("*.norm_out.*", "*.conv_norm_out.*")
    yield from _resnet("*.mid.block_1", "*.mid_block.resnets.0")
    yield from _resnet("*.mid.block_2", "*.mid_block.resnets.1")
    yield renamed("*.mid.attn_1.norm.*", "*.mid_block.attentions.0.group_norm.*")
    for theirs, ours in _ATTENTION.items():
        yield renamed(f"*.mid.attn_1.{theirs}.*", f"*.mid_block.attentions.0.{ours}.*", Pointwise())
    yield from _resnet("encoder.down.#.block.#", "encoder.down_blocks.#.resnets.#")
    yield renamed("encoder.down.#.downsample.conv.*", "encoder.down_blocks.#.downsamplers.0.conv.*")
    for level in range(levels):
        # Levels of the decoder are counted from the picture there, and from the latents here.
        theirs, ours = f"decoder.up.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        yield from _resnet(f"{theirs}.block.#", f"{ours}.resnets.#")
        yield renamed(f"{theirs}.upsample.conv.*", f"{ours}.upsamplers.0.conv.*")
    yield renamed("*", "*")


def _resnet(theirs: str, ours: str) -> Iterator[Rule]:
    yield renamed(f"{theirs}.nin_shortcut.*", f"{ours}.conv_shortcut.*")
    for part in ("norm1", "conv1", "norm2", "conv2"):
        yield renamed(f"{theirs}.{part}.*", f"{ours}.{part}.*")


NAMINGS = (
    Naming(
        architecture="vae",
        scheme="original",
        marks=("decoder.mid.attn_1.q.weight", "encoder.down.0.block.0.conv1.weight"),
        prefixes=("", "first_stage_model.", "vae."),
        rules=_rules,
    ),
    Naming(
        architecture="vae",
        scheme="diffusers",
        marks=("decoder.mid_block.attentions.0.to_q.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"),
        prefixes=("",),
    ),
)
"""Of AutoencoderKL."""
