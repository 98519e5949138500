"""The VAE of Wan 2.1, which Qwen-Image has as well (AutoencoderKLWan, AutoencoderKLQwenImage): original names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from hasten.formats.keys.naming import Naming, Rule, renamed

_RESNET = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}


def _rules(names: Collection[str]) -> Sequence[Rule]:
    return tuple(_all(*_shape(names)))


def _shape(names: Collection[str]) -> tuple[int, int]:
    """Levels of the decoder, and residual blocks of a level, from names of either naming."""
    ours = [re.match(r"decoder\.up_blocks\.(\d+)\.resnets\.(\d+)\.", name) for name in names]
    if found := [(int(match[1]), int(match[2])) for match in ours if match]:
        return 1 + max(level for level, _ in found), 1 + max(block for _, block in found)
    theirs = [re.match(r"decoder\.upsamples\.(\d+)\.resample\.", name) for name in names]
    # The upsamplers, which stand behind each level but the last, are numbered along with the residual blocks.
    ends = sorted({int(match[1]) for match in theirs if match})
    return 1 + len(ends), ends[0] if ends else 3


def _all(levels: int, blocks: int) -> Iterator[Rule]:
    yield renamed("conv1.*", "quant_conv.*")
    yield renamed("conv2.*", "post_quant_conv.*")
    for half in ("encoder", "decoder"):
        yield renamed(f"{half}.conv1.*", f"{half}.conv_in.*")
        yield renamed(f"{half}.head.0.*", f"{half}.norm_out.*")
        yield renamed(f"{half}.head.2.*", f"{half}.conv_out.*")
        yield from _resnet(f"{half}.middle.0", f"{half}.mid_block.resnets.0")
        yield renamed(f"{half}.middle.1.*", f"{half}.mid_block.attentions.0.*")
        yield from _resnet(f"{half}.middle.2", f"{half}.mid_block.resnets.1")
    yield from _resnet("encoder.downsamples.#", "encoder.down_blocks.#")
    yield renamed("encoder.downsamples.*", "encoder.down_blocks.*")
    for level in range(levels):
        theirs, ours = level * (blocks + 1), f"decoder.up_blocks.{level}"
        for block in range(blocks):
            yield from _resnet(f"decoder.upsamples.{theirs + block}", f"{ours}.resnets.{block}")
        yield renamed(f"decoder.upsamples.{theirs + blocks}.*", f"{ours}.upsamplers.0.*")


def _resnet(theirs: str, ours: str) -> Iterator[Rule]:
    yield renamed(f"{theirs}.shortcut.*", f"{ours}.conv_shortcut.*")
    for their, our in _RESNET.items():
        yield renamed(f"{theirs}.{their}.*", f"{ours}.{our}.*")


NAMINGS = (
    Naming(
        architecture="wan_vae",
        scheme="original",
        marks=("decoder.upsamples.0.residual.0.gamma", "encoder.conv1.weight"),
        prefixes=("", "first_stage_model.", "vae."),
        rules=_rules,
    ),
    Naming(
        architecture="wan_vae",
        scheme="diffusers",
        marks=("decoder.up_blocks.0.resnets.0.norm1.gamma", "encoder.conv_in.weight"),
        prefixes=("",),
    ),
)
"""Of AutoencoderKLWan as Wan 2.1 has it; the VAE of Wan 2.2's 5B model is built otherwise."""
