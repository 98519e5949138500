"""Text encoders: T5 as in GGUF files, OpenCLIP as in checkpoints of SDXL, CLIP as everywhere."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from hasten.formats.keys.joins import Transposed
from hasten.formats.keys.naming import Naming, Rule, fused, renamed

_T5 = {
    "attn_q": "0.SelfAttention.q",
    "attn_k": "0.SelfAttention.k",
    "attn_v": "0.SelfAttention.v",
    "attn_o": "0.SelfAttention.o",
    "attn_rel_b": "0.SelfAttention.relative_attention_bias",
    "attn_norm": "0.layer_norm",
    "ffn_gate": "1.DenseReluDense.wi_0",
    "ffn_up": "1.DenseReluDense.wi_1",
    "ffn_down": "1.DenseReluDense.wo",
    "ffn_norm": "1.layer_norm",
}


def _t5(names: Collection[str]) -> Sequence[Rule]:
    blocks = (renamed(f"enc.blk.#.{theirs}.*", f"encoder.block.#.layer.{ours}.*") for theirs, ours in _T5.items())
    return (
        renamed("token_embd.*", "shared.*"),
        renamed("enc.output_norm.*", "encoder.final_layer_norm.*"),
        *blocks,
    )


_OPEN = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def _open_clip(names: Collection[str]) -> Sequence[Rule]:
    return tuple(_open_clip_rules())


def _open_clip_rules() -> Iterator[Rule]:
    theirs, ours = "transformer.resblocks.#", "text_model.encoder.layers.#"
    yield renamed("token_embedding.weight", "text_model.embeddings.token_embedding.weight")
    yield renamed("positional_embedding", "text_model.embeddings.position_embedding.weight")
    yield renamed("ln_final.*", "text_model.final_layer_norm.*")
    yield renamed("text_projection", "text_projection.weight", Transposed())
    for kind in ("weight", "bias"):
        parts = (f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv")
        yield fused(f"{theirs}.attn.in_proj_{kind}", *parts)
    yield renamed(f"{theirs}.attn.out_proj.*", f"{ours}.self_attn.out_proj.*")
    for their_part, our_part in _OPEN.items():
        yield renamed(f"{theirs}.{their_part}.*", f"{ours}.{our_part}.*")


_CLIP = ("text_model.encoder.layers.0.self_attn.q_proj.weight",)
_CLIP_BUFFERS = ("text_model.embeddings.position_ids",)
_CLIP_PLACES = (
    "", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.",
    "text_encoders.clip_l.transformer.", "text_encoders.clip_g.transformer.",
)  # fmt: skip
NAMINGS = (
    Naming(
        architecture="t5",
        scheme="original",
        marks=("token_embd.weight", "enc.blk.0.attn_q.weight"),
        prefixes=("",),
        rules=_t5,
    ),
    Naming(
        architecture="t5",
        scheme="diffusers",
        marks=("encoder.block.0.layer.0.SelfAttention.q.weight",),
        prefixes=("", "text_encoders.t5xxl.transformer."),
        ignored=("encoder.embed_tokens.weight",),
    ),
    Naming(
        architecture="open_clip",
        scheme="original",
        marks=("transformer.resblocks.0.attn.in_proj_weight", "token_embedding.weight"),
        prefixes=("", "conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "cond_stage_model.model."),
        rules=_open_clip,
        ignored=("logit_scale", "attn_mask"),
    ),
    Naming(architecture="clip", scheme="diffusers", marks=_CLIP, prefixes=_CLIP_PLACES, ignored=_CLIP_BUFFERS),
    # With transformers' names the two cannot be told apart; this one has to be asked for.
    Naming(architecture="open_clip", scheme="diffusers", marks=_CLIP, prefixes=_CLIP_PLACES, ignored=_CLIP_BUFFERS),
)  # fmt: skip
"""Of text encoders."""
