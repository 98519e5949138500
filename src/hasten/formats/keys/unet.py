"""The U-Nets of Stable Diffusion 1.5 and SDXL: names of the latent diffusion repository (LDM)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from hasten.formats.keys.naming import Naming, Rule, renamed

_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_RESNET = {
    "in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut",
}  # fmt: skip
_LAYERS = 2
"""Resnets in a level on the way down; there is one more on the way up."""


def _rules(names: Collection[str]) -> Sequence[Rule]:
    return tuple(_all(set(names), 1 + max(_levels(names), default=0)))


def _levels(names: Collection[str]) -> Iterator[int]:
    for name in names:
        if match := re.match(r"(down_blocks|input_blocks)\.(\d+)\.", name):
            yield int(match[2]) if match[1] == "down_blocks" else (int(match[2]) - 1) // (_LAYERS + 1)


def _all(names: set[str], levels: int) -> Iterator[Rule]:
    for theirs, ours in _OUTSIDE.items():
        yield renamed(f"{theirs}.*", f"{ours}.*")
    yield from _resnet("middle_block.0", "mid_block.resnets.0")
    yield renamed("middle_block.1.*", "mid_block.attentions.0.*")
    yield from _resnet("middle_block.2", "mid_block.resnets.1")
    for level in range(levels):
        yield from _down(level)
        yield from _up(level, names)


def _down(level: int) -> Iterator[Rule]:
    for layer in range(_LAYERS):
        place = 1 + level * (_LAYERS + 1) + layer
        yield from _resnet(f"input_blocks.{place}.0", f"down_blocks.{level}.resnets.{layer}")
        yield renamed(f"input_blocks.{place}.1.*", f"down_blocks.{level}.attentions.{layer}.*")
    end = (level + 1) * (_LAYERS + 1)
    yield renamed(f"input_blocks.{end}.0.op.*", f"down_blocks.{level}.downsamplers.0.conv.*")


def _up(level: int, names: set[str]) -> Iterator[Rule]:
    first, last = level * (_LAYERS + 1), level * (_LAYERS + 1) + _LAYERS
    # The upsampler comes after the attention, if the level has any.
    attention = (f"output_blocks.{last}.1.norm.weight", f"up_blocks.{level}.attentions.{_LAYERS}.norm.weight")
    place = 2 if names.intersection(attention) else 1
    yield renamed(f"output_blocks.{last}.{place}.conv.*", f"up_blocks.{level}.upsamplers.0.conv.*")
    for layer in range(_LAYERS + 1):
        yield from _resnet(f"output_blocks.{first + layer}.0", f"up_blocks.{level}.resnets.{layer}")
        yield renamed(f"output_blocks.{first + layer}.1.*", f"up_blocks.{level}.attentions.{layer}.*")


def _resnet(theirs: str, ours: str) -> Iterator[Rule]:
    for their_part, our_part in _RESNET.items():
        yield renamed(f"{theirs}.{their_part}.*", f"{ours}.{our_part}.*")


_MARKS = ("input_blocks.0.0.weight", "out.2.weight", "time_embed.0.weight")
_OURS = ("conv_in.weight", "down_blocks.0.resnets.0.conv1.weight", "time_embedding.linear_1.weight")
NAMINGS = (
    Naming(architecture="sdxl", scheme="original", marks=(*_MARKS, "label_emb.0.0.weight"), rules=_rules),
    Naming(architecture="stable_diffusion", scheme="original", marks=_MARKS, rules=_rules),
    Naming(architecture="sdxl", scheme="diffusers", marks=(*_OURS, "add_embedding.linear_1.weight")),
    Naming(architecture="stable_diffusion", scheme="diffusers", marks=_OURS),
)
"""Of Stable Diffusion 1.5 and SDXL."""
