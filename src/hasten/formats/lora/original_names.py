"""The names that layers have in the repositories which models come from, as kohya's trainers and ComfyUI use them.

Data alone: for each family of models, patterns of diffusers' names and what stands for them. Where several layers
of diffusers are parts of one original layer, they follow each other in its outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Original:
    """The original name of a layer, and which part of that layer it is."""

    name: str
    part: int = 0
    halves_swapped: bool = False
    """Are the two halves of its outputs (shift and scale) in the other order there?"""


_ATTENTION = {"to_q": 0, "to_k": 1, "to_v": 2}
_ADDED = {"add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}
FLUX: dict[str, Original] = {
    **{rf"transformer_blocks\.(\d+)\.attn\.{k}": Original(r"double_blocks.\1.img_attn.qkv", i)
       for k, i in _ATTENTION.items()},
    **{rf"transformer_blocks\.(\d+)\.attn\.{k}": Original(r"double_blocks.\1.txt_attn.qkv", i)
       for k, i in _ADDED.items()},
    r"transformer_blocks\.(\d+)\.attn\.to_out\.0": Original(r"double_blocks.\1.img_attn.proj"),
    r"transformer_blocks\.(\d+)\.attn\.to_add_out": Original(r"double_blocks.\1.txt_attn.proj"),
    r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": Original(r"double_blocks.\1.img_mlp.0"),
    r"transformer_blocks\.(\d+)\.ff\.net\.2": Original(r"double_blocks.\1.img_mlp.2"),
    r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj": Original(r"double_blocks.\1.txt_mlp.0"),
    r"transformer_blocks\.(\d+)\.ff_context\.net\.2": Original(r"double_blocks.\1.txt_mlp.2"),
    r"transformer_blocks\.(\d+)\.norm1\.linear": Original(r"double_blocks.\1.img_mod.lin"),
    r"transformer_blocks\.(\d+)\.norm1_context\.linear": Original(r"double_blocks.\1.txt_mod.lin"),
    **{rf"single_transformer_blocks\.(\d+)\.attn\.{k}": Original(r"single_blocks.\1.linear1", i)
       for k, i in _ATTENTION.items()},
    r"single_transformer_blocks\.(\d+)\.proj_mlp": Original(r"single_blocks.\1.linear1", 3),
    r"single_transformer_blocks\.(\d+)\.proj_out": Original(r"single_blocks.\1.linear2"),
    r"single_transformer_blocks\.(\d+)\.norm\.linear": Original(r"single_blocks.\1.modulation.lin"),
    r"x_embedder": Original("img_in"),
    r"context_embedder": Original("txt_in"),
    r"time_text_embed\.timestep_embedder\.linear_1": Original("time_in.in_layer"),
    r"time_text_embed\.timestep_embedder\.linear_2": Original("time_in.out_layer"),
    r"time_text_embed\.text_embedder\.linear_1": Original("vector_in.in_layer"),
    r"time_text_embed\.text_embedder\.linear_2": Original("vector_in.out_layer"),
    r"time_text_embed\.guidance_embedder\.linear_1": Original("guidance_in.in_layer"),
    r"time_text_embed\.guidance_embedder\.linear_2": Original("guidance_in.out_layer"),
    r"norm_out\.linear": Original("final_layer.adaLN_modulation.1", halves_swapped=True),
    r"proj_out": Original("final_layer.linear"),
}  # fmt: skip
"""The names of Black Forest Labs' repository (FLUX.1)."""

RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
}


def flux_names(paths: Iterable[str]) -> Iterator[tuple[str, Original]]:
    """The layers that have an original name in FLUX.1, with it."""
    patterns = [(re.compile(pattern), original) for pattern, original in FLUX.items()]
    for path in paths:
        for pattern, original in patterns:
            if match := pattern.fullmatch(path):
                yield path, Original(match.expand(original.name), original.part, original.halves_swapped)


def unet_names(paths: Iterable[str]) -> Iterator[tuple[str, Original]]:
    """The layers of a U-Net with their names in the repositories of Stable Diffusion, which count all blocks in a row.

    A stage has as many residual blocks down as its first stage shows, and one more on the way up.
    """
    known = list(paths)
    depth = len({match[1] for path in known if (match := re.match(r"down_blocks\.0\.resnets\.(\d+)\.", path))})
    attended = {match[1] for path in known if (match := re.match(r"up_blocks\.(\d+)\.attentions\.", path))}
    for path in known:
        if path in OUTSIDE:
            yield path, Original(OUTSIDE[path])
        elif (match := re.match(r"(down|mid|up)_blocks?\.(.+)", path)) and depth:
            name = _in_unet(match[1], match[2], depth, attended)
            if name is not None:
                yield path, Original(name)


def _in_unet(side: str, rest: str, depth: int, attended: set[str]) -> str | None:
    if side == "mid":
        match = re.fullmatch(r"(resnets|attentions)\.(\d+)\.(.+)", rest)
        place = match and {"resnets": 2 * int(match[2]), "attentions": 1}[match[1]]
        return f"middle_block.{place}.{_inner(match[1], match[3])}" if match else None
    match = re.fullmatch(r"(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)", rest)
    if match is None:
        return None
    stage, kind, number, inner = int(match[1]), match[2], int(match[3]), _inner(match[2], match[4])
    if side == "down":
        place = 1 + stage * (depth + 1) + (depth if kind == "downsamplers" else number)
        inner = "op" if kind == "downsamplers" else inner
        return f"input_blocks.{place}.{int(kind == 'attentions')}.{inner}"
    place = stage * (depth + 1) + (depth if kind == "upsamplers" else number)
    column = 1 + (match[1] in attended) if kind == "upsamplers" else int(kind == "attentions")
    return f"output_blocks.{place}.{column}.{inner}"


def _inner(kind: str, name: str) -> str:
    return RESNET.get(name, name) if kind == "resnets" else name


FAMILIES: tuple[Callable[[Iterable[str]], Iterator[tuple[str, Original]]], ...] = (flux_names, unet_names)
"""Each finds the layers whose names it knows, whatever the model is."""
