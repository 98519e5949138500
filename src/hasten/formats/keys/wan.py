"""Wan 2.1 and 2.2: names of the original repository."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from hasten.formats.keys.naming import Naming, Rule, renamed

_EMBEDDERS = {
    "time_embedding.0": "time_embedder.linear_1",
    "time_embedding.2": "time_embedder.linear_2",
    "text_embedding.0": "text_embedder.linear_1",
    "text_embedding.2": "text_embedder.linear_2",
    "time_projection.1": "time_proj",
    "img_emb.proj.0": "image_embedder.norm1",
    "img_emb.proj.1": "image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "image_embedder.ff.net.2",
    "img_emb.proj.4": "image_embedder.norm2",
}
_ATTENTION = {
    "q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k",
    "k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k",
}  # fmt: skip


def _rules(names: Collection[str]) -> Sequence[Rule]:
    return tuple(_all())


def _all() -> Iterator[Rule]:
    yield renamed("patch_embedding.*", "patch_embedding.*")
    yield renamed("img_emb.emb_pos", "condition_embedder.image_embedder.pos_embed")
    for theirs, ours in _EMBEDDERS.items():
        yield renamed(f"{theirs}.*", f"condition_embedder.{ours}.*")
    yield renamed("head.modulation", "scale_shift_table")
    yield renamed("head.head.*", "proj_out.*")
    yield renamed("blocks.#.modulation", "blocks.#.scale_shift_table")
    # The norm before cross-attention, the only one with weights, is third there and second here.
    yield renamed("blocks.#.norm3.*", "blocks.#.norm2.*")
    yield renamed("blocks.#.ffn.0.*", "blocks.#.ffn.net.0.proj.*")
    yield renamed("blocks.#.ffn.2.*", "blocks.#.ffn.net.2.*")
    for side, attention in (("self_attn", "attn1"), ("cross_attn", "attn2")):
        for theirs, ours in _ATTENTION.items():
            yield renamed(f"blocks.#.{side}.{theirs}.*", f"blocks.#.{attention}.{ours}.*")


NAMINGS = (
    Naming(
        architecture="wan",
        scheme="original",
        marks=("head.modulation", "blocks.0.self_attn.q.weight"),
        rules=_rules,
    ),
    Naming(
        architecture="wan",
        scheme="diffusers",
        marks=("condition_embedder.time_proj.weight", "blocks.0.attn1.to_q.weight"),
    ),
)
"""Of Wan."""
