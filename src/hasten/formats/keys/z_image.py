"""Z-Image: names of the original files."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from hasten.formats.keys.naming import Naming, Rule, fused, renamed


def _rules(names: Collection[str]) -> Sequence[Rule]:
    return (
        fused("*.attention.qkv.*", *(f"*.attention.to_{part}.*" for part in "qkv")),
        renamed("*.attention.out.*", "*.attention.to_out.0.*"),
        renamed("*.attention.q_norm.*", "*.attention.norm_q.*"),
        renamed("*.attention.k_norm.*", "*.attention.norm_k.*"),
        renamed("final_layer.*", "all_final_layer.2-1.*"),
        renamed("x_embedder.*", "all_x_embedder.2-1.*"),
        renamed("*", "*"),
    )


NAMINGS = (
    Naming(
        architecture="z_image",
        scheme="original",
        marks=("layers.0.attention.qkv.weight", "layers.0.adaLN_modulation.0.weight"),
        rules=_rules,
        ignored=("norm_final.weight",),
    ),
    Naming(
        architecture="z_image",
        scheme="diffusers",
        marks=("layers.0.attention.to_q.weight", "layers.0.adaLN_modulation.0.weight"),
    ),
)
"""Of Z-Image."""
