"""FLUX.1: names of Black Forest Labs (dev, schnell, Kontext, Fill) and of nunchaku's files."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from hasten.formats.keys.joins import Halves, Inputs
from hasten.formats.keys.naming import Naming, Rule, fused, renamed

_STREAMS = {
    "img": {
        "mod": "norm1", "qkv": ("to_q", "to_k", "to_v"), "q": "norm_q", "k": "norm_k", "out": "to_out.0", "mlp": "ff",
    },
    "txt": {
        "mod": "norm1_context", "qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
        "q": "norm_added_q", "k": "norm_added_k", "out": "to_add_out", "mlp": "ff_context",
    },
}  # fmt: skip


def _original(names: Collection[str]) -> Sequence[Rule]:
    return (*_embedders(), *_double("img"), *_double("txt"), *_single(), *_final())


def _embedders() -> Iterator[Rule]:
    for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
        for layer, number in (("in_layer", 1), ("out_layer", 2)):
            yield renamed(f"{theirs}_in.{layer}.*", f"time_text_embed.{ours}_embedder.linear_{number}.*")
    yield renamed("txt_in.*", "context_embedder.*")
    yield renamed("img_in.*", "x_embedder.*")


def _double(stream: str) -> Iterator[Rule]:
    theirs, ours, name = f"double_blocks.#.{stream}", "transformer_blocks.#", _STREAMS[stream]
    yield renamed(f"{theirs}_mod.lin.*", f"{ours}.{name['mod']}.linear.*")
    yield fused(f"{theirs}_attn.qkv.*", *(f"{ours}.attn.{part}.*" for part in name["qkv"]))
    yield renamed(f"{theirs}_attn.norm.query_norm.scale", f"{ours}.attn.{name['q']}.weight")
    yield renamed(f"{theirs}_attn.norm.key_norm.scale", f"{ours}.attn.{name['k']}.weight")
    yield renamed(f"{theirs}_attn.proj.*", f"{ours}.attn.{name['out']}.*")
    yield renamed(f"{theirs}_mlp.0.*", f"{ours}.{name['mlp']}.net.0.proj.*")
    yield renamed(f"{theirs}_mlp.2.*", f"{ours}.{name['mlp']}.net.2.*")


def _single() -> Iterator[Rule]:
    theirs, ours = "single_blocks.#", "single_transformer_blocks.#"
    yield renamed(f"{theirs}.modulation.lin.*", f"{ours}.norm.linear.*")
    parts = (*(f"{ours}.attn.{part}.*" for part in ("to_q", "to_k", "to_v")), f"{ours}.proj_mlp.*")
    yield fused(f"{theirs}.linear1.*", *parts, shares=(1, 1, 1, 4))
    yield renamed(f"{theirs}.linear2.*", f"{ours}.proj_out.*")
    yield renamed(f"{theirs}.norm.query_norm.scale", f"{ours}.attn.norm_q.weight")
    yield renamed(f"{theirs}.norm.key_norm.scale", f"{ours}.attn.norm_k.weight")


def _final() -> Iterator[Rule]:
    yield renamed("final_layer.linear.*", "proj_out.*")
    yield renamed("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", Halves())


def _nunchaku(names: Collection[str]) -> Sequence[Rule]:
    return (*_nunchaku_double(), *_nunchaku_single(), renamed("*", "*"))


def _nunchaku_double() -> Iterator[Rule]:
    block = "transformer_blocks.#"
    for suffix, name in (("", _STREAMS["img"]), ("_context", _STREAMS["txt"])):
        yield fused(f"{block}.qkv_proj{suffix}.*", *(f"{block}.attn.{part}.*" for part in name["qkv"]))
        yield renamed(f"{block}.out_proj{suffix}.*", f"{block}.attn.{name['out']}.*")
        yield renamed(f"{block}.mlp{suffix}_fc1.*", f"{block}.{name['mlp']}.net.0.proj.*")
        yield renamed(f"{block}.mlp{suffix}_fc2.*", f"{block}.{name['mlp']}.net.2.*")
        for norm in ("q", "k"):
            theirs = f"norm_{norm}" if not suffix else f"norm_added_{norm}"
            yield renamed(f"{block}.{theirs}.*", f"{block}.attn.{name[norm]}.*")


def _nunchaku_single() -> Iterator[Rule]:
    block = "single_transformer_blocks.#"
    yield fused(f"{block}.qkv_proj.*", *(f"{block}.attn.{part}.*" for part in ("to_q", "to_k", "to_v")))
    yield renamed(f"{block}.mlp_fc1.*", f"{block}.proj_mlp.*")
    # One layer over attention and feed-forward, of which the file has the two halves of the inputs.
    yield Rule((f"{block}.out_proj.*", f"{block}.mlp_fc2.*"), (f"{block}.proj_out.*",), Inputs((1, 4)))
    for norm in ("norm_q", "norm_k"):
        yield renamed(f"{block}.{norm}.*", f"{block}.attn.{norm}.*")


NAMINGS = (
    Naming(
        architecture="flux",
        scheme="original",
        marks=("double_blocks.0.img_attn.qkv.weight", "double_blocks.0.img_mod.lin.weight"),
        rules=_original,
    ),
    Naming(
        architecture="flux",
        scheme="nunchaku",
        marks=("single_transformer_blocks.0.qkv_proj.weight", "single_transformer_blocks.0.mlp_fc2.weight"),
        rules=_nunchaku,
    ),
    Naming(
        architecture="flux",
        scheme="diffusers",
        marks=("single_transformer_blocks.0.proj_mlp.weight", "transformer_blocks.0.norm1_context.linear.weight"),
    ),
)
"""Of FLUX.1."""
