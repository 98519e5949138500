"""What Wan 2.2 Animate has beside Wan: the encoder of motion, that of faces, and the adapter that puts faces in."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.formats.keys.joins import Channels
from hasten.formats.keys.naming import Rule, fused, renamed

IGNORED = ("motion_encoder.enc.net_app.convs.*.kernel",)
"""Blurs, which diffusers computes."""
_RES_BLOCKS = 7
"""Of a face of 512 x 512, which all released files have."""


def animate() -> Iterator[Rule]:
    """The rules for these parts."""
    yield renamed("pose_patch_embedding.*", "pose_patch_embedding.*")
    yield renamed("motion_encoder.dec.direction.weight", "motion_encoder.motion_synthesis_weight")
    yield renamed("motion_encoder.enc.fc.*", "motion_encoder.motion_network.*")
    yield from _motion("motion_encoder.enc.net_app.convs", "motion_encoder")
    for number in "23":
        yield renamed(f"face_encoder.conv{number}.conv.*", f"face_encoder.conv{number}.*")
    yield renamed("face_encoder.conv1_local.conv.*", "face_encoder.conv1_local.*")
    yield renamed("face_encoder.*", "face_encoder.*")
    yield from _adapter("face_adapter.fuser_blocks.#", "face_adapter.#")


def _motion(theirs: str, ours: str) -> Iterator[Rule]:
    yield renamed(f"{theirs}.0.0.weight", f"{ours}.conv_in.weight")
    yield renamed(f"{theirs}.0.1.bias", f"{ours}.conv_in.act_fn.bias", Channels())
    yield renamed(f"{theirs}.{_RES_BLOCKS + 1}.weight", f"{ours}.conv_out.weight")
    for number in range(_RES_BLOCKS):
        their, our = f"{theirs}.{number + 1}", f"{ours}.res_blocks.{number}"
        yield renamed(f"{their}.conv1.0.weight", f"{our}.conv1.weight")
        yield renamed(f"{their}.conv1.1.bias", f"{our}.conv1.act_fn.bias", Channels())
        yield renamed(f"{their}.conv2.1.weight", f"{our}.conv2.weight")
        yield renamed(f"{their}.conv2.2.bias", f"{our}.conv2.act_fn.bias", Channels())
        yield renamed(f"{their}.skip.1.weight", f"{our}.conv_skip.weight")


def _adapter(theirs: str, ours: str) -> Iterator[Rule]:
    yield renamed(f"{theirs}.linear1_q.*", f"{ours}.to_q.*")
    yield fused(f"{theirs}.linear1_kv.*", f"{ours}.to_k.*", f"{ours}.to_v.*")
    yield renamed(f"{theirs}.linear2.*", f"{ours}.to_out.*")
    for norm in "qk":
        yield renamed(f"{theirs}.{norm}_norm.*", f"{ours}.norm_{norm}.*")
