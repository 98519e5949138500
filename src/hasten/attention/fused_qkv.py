"""Computes queries, keys and values in one product instead of three."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from torch import nn

from hasten.attention.projections import FusedProjections, Place, ProjectionPart, Storage, obstacle, stacked
from hasten.core.errors import HastenError, NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Denoiser, Target
from hasten.core.technique import Cost, Evidence, Stage, Technique
from hasten.core.workload import Workload

_SELF = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
_CROSS = {"to_kv": ("to_k", "to_v"), "to_added_kv": ("add_k_proj", "add_v_proj")}
"""Diffusers' names of the stacked layer and of the layers it stands for; in cross-attention the text has no queries."""


@dataclass(frozen=True, kw_only=True)
class FusedQKV(Technique):
    """Stacks the query, key and value projections of each attention module into one matrix product.

    Exact up to rounding. Works on every architecture whose attention modules have these projections, also where
    diffusers has no `fuse_qkv_projections` (Z-Image, DiT); in cross-attention keys and values are stacked. The memory
    of the separate weights is given up meanwhile, so nothing is held twice. Adapters (LoRA) that are loaded before or
    later keep working, and quantization, which comes after, meets one large layer instead of three.
    """

    stage: ClassVar[Stage] = Stage.STRUCTURE
    paper: ClassVar[str] = "https://huggingface.co/docs/diffusers/optimization/fp16#fuse-qkv-projections"

    def claims(self) -> tuple[str, ...]:
        """The projections of attention."""
        return ("attention.projections",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs plain linear projections that lie in one place."""
        for denoiser in target.denoisers:
            yield from _problems(denoiser, target)

    def apply(self, target: Target, patch: Patch) -> None:
        """Stack the weights, and put parts of the common product in the layers' places."""
        groups = patch.keep(_Groups())
        for denoiser in target.denoisers:
            for owner, name, places in _sites(denoiser):
                groups.found.append(_fuse(patch, owner, name, places))
            if hasattr(denoiser.module, "save_pretrained"):
                what = "cannot be saved while projections are fused"
                patch.around(denoiser.module, _not_saved, what, method="save_pretrained")

    def engaged(self, session: Session) -> Evidence:
        """The stacked layers computed, and the parts are still in their places."""
        groups = session.state(self, _Groups).found
        ran = [group for group in groups if group.ran]
        if not ran:
            raise NotEngaged("no stacked projection was computed.")
        separate = sum(len(group.sizes) for group in ran)
        return Evidence(summary=f"{separate} projections were computed as {len(ran)} (of {len(groups)} stacked)")

    def cost(self, target: Target, workload: Workload) -> Cost:
        """The gain depends on sizes and device; memory does not grow."""
        return Cost(basis="measured")


class _Groups:
    """The stacked layers of a session."""

    def __init__(self) -> None:
        self.found: list[FusedProjections] = []


def _sites(denoiser: Denoiser) -> Iterator[tuple[nn.Module, str, list[Place]]]:
    """Every group of projections with one input: its module, the name of the stacked layer, and the layers."""
    for _, owner in denoiser.of_class(*denoiser.spec.attention):
        names = _CROSS if getattr(owner, "is_cross_attention", False) else _SELF
        for stack, members in names.items():
            places = [Place.find(owner, name) for name in members]
            if all(places):
                yield owner, stack, cast("list[Place]", places)


def _problems(denoiser: Denoiser, target: Target) -> Iterator[str]:
    title = denoiser.spec.model_class
    modules = [module for _, module in denoiser.of_class(*denoiser.spec.attention)]
    if any(getattr(module, "fused_projections", False) for module in modules):
        yield f"the projections of {title} are fused by diffusers; call unfuse_qkv_projections() first."
        return
    sites = list(_sites(denoiser))
    if not sites:
        yield f"hasten finds no query, key and value projections in the attention modules of {title}."
    layers = [[place.module for place in places] for _, _, places in sites]
    found = {reason for one in layers if (reason := obstacle(one))}
    yield from (f"{title} cannot be fused: {reason}." for reason in sorted(found))
    weights = [cast(nn.Linear, layer).weight for one in layers for layer in one if not found]
    if target.device.type != "meta" and any(weight.device.type == "meta" for weight in weights):
        yield f"the weights of {title} are offloaded; apply FusedQKV before offloading."


def _fuse(patch: Patch, owner: nn.Module, name: str, places: list[Place]) -> FusedProjections:
    layers = [cast(nn.Linear, place.module) for place in places]
    stack = stacked(layers)
    group = FusedProjections(owner, name, tuple(layer.out_features for layer in layers))
    storage = Storage(layers, stack, group)
    patch.undo(owner, f"{len(layers)} projections are computed as one, {name}", storage.refill)
    patch.add(owner, name, stack, "holds the stacked weights")
    for index, (place, layer) in enumerate(zip(places, layers, strict=True)):
        patch.swap(place.parent, place.name, ProjectionPart(group, index, layer), f"is a part of {name}")
    if all(place.module is not layer for place, layer in zip(places, layers, strict=True)):
        storage.release()
    return group


def _not_saved(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    raise HastenError(
        "The denoiser cannot be saved while FusedQKV is applied: its weights have other names; leave the session first."
    )
