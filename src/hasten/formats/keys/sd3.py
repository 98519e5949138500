"""Stable Diffusion 3 and 3.5: names of Stability AI."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from hasten.formats.keys.joins import Halves
from hasten.formats.keys.naming import Naming, Rule, fused, renamed

_ATTENTION = {
    "x_block": {"qkv": ("to_q", "to_k", "to_v"), "q": "norm_q", "k": "norm_k", "out": "to_out.0"},
    "context_block": {
        "qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "q": "norm_added_q", "k": "norm_added_k", "out": "to_add_out",
    },
}  # fmt: skip
_OURS = "transformer_blocks.#"


def _rules(names: Collection[str]) -> Sequence[Rule]:
    return (
        *_outside(),
        *_last_norm(names),
        *_block("x_block", "norm1", "ff"),
        *_block("context_block", "norm1_context", "ff_context"),
        *_attention("joint_blocks.#.x_block.attn", f"{_OURS}.attn", "x_block"),
        *_attention("joint_blocks.#.context_block.attn", f"{_OURS}.attn", "context_block"),
        *_attention("joint_blocks.#.x_block.attn2", f"{_OURS}.attn2", "x_block"),
    )


def _outside() -> Iterator[Rule]:
    yield renamed("pos_embed", "pos_embed.pos_embed")
    yield renamed("x_embedder.proj.*", "pos_embed.proj.*")
    for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
        yield renamed(f"{theirs}.mlp.0.*", f"time_text_embed.{ours}.linear_1.*")
        yield renamed(f"{theirs}.mlp.2.*", f"time_text_embed.{ours}.linear_2.*")
    yield renamed("context_embedder.*", "context_embedder.*")
    yield renamed("final_layer.linear.*", "proj_out.*")
    yield renamed("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", Halves())


def _last_norm(names: Collection[str]) -> Iterator[Rule]:
    """The last block gives no context on, so that its norm has the form of the last layer's."""
    numbers = [re.match(r"(?:joint|transformer)_blocks\.(\d+)\.", name) for name in names]
    last = max((int(match[1]) for match in numbers if match), default=0)
    theirs = f"joint_blocks.{last}.context_block.adaLN_modulation.1.*"
    yield renamed(theirs, f"transformer_blocks.{last}.norm1_context.linear.*", Halves())


def _block(theirs: str, norm: str, feed_forward: str) -> Iterator[Rule]:
    yield renamed(f"joint_blocks.#.{theirs}.adaLN_modulation.1.*", f"{_OURS}.{norm}.linear.*")
    yield renamed(f"joint_blocks.#.{theirs}.mlp.fc1.*", f"{_OURS}.{feed_forward}.net.0.proj.*")
    yield renamed(f"joint_blocks.#.{theirs}.mlp.fc2.*", f"{_OURS}.{feed_forward}.net.2.*")


def _attention(theirs: str, ours: str, side: str) -> Iterator[Rule]:
    name = _ATTENTION[side]
    yield fused(f"{theirs}.qkv.*", *(f"{ours}.{part}.*" for part in name["qkv"]))
    yield renamed(f"{theirs}.ln_q.*", f"{ours}.{name['q']}.*")
    yield renamed(f"{theirs}.ln_k.*", f"{ours}.{name['k']}.*")
    yield renamed(f"{theirs}.proj.*", f"{ours}.{name['out']}.*")


NAMINGS = (
    Naming(
        architecture="sd3",
        scheme="original",
        marks=("joint_blocks.0.x_block.attn.qkv.weight", "joint_blocks.0.context_block.adaLN_modulation.1.weight"),
        rules=_rules,
    ),
    Naming(
        architecture="sd3",
        scheme="diffusers",
        marks=("pos_embed.proj.weight", "transformer_blocks.0.attn.add_q_proj.weight"),
    ),
)
"""Of Stable Diffusion 3."""
