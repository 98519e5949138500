"""The site behind caches that compute a front first, for transformers and U-Nets alike."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.cache.engine.deep_feature import DeepFeatureSite, cuts
from hasten.cache.engine.problems import compiled_whole, no_cut, no_stack
from hasten.cache.engine.site import Site
from hasten.cache.engine.stack import StackSite
from hasten.core.target import Denoiser, Target


def front_site(denoiser: Denoiser, *, front: int, back: int) -> Site:
    """What lies between the first `front` and the last `back` blocks.

    Of a U-Net the front is its outermost `front` down layers, which are joined to as many up layers and one more.
    """
    if denoiser.spec.unet is not None:
        return DeepFeatureSite(denoiser, cuts(denoiser)[front])
    return StackSite(denoiser, front=front, back=back)


def no_front(target: Target, *, front: int, back: int) -> Iterator[str]:
    """Complain about denoisers that have no such front, or where nothing can be decided after it."""
    for denoiser in target.denoisers:
        if denoiser.spec.unet is None:
            yield from list(no_stack(denoiser)) or _too_deep(denoiser, front, back)
        elif back:
            yield "a U-Net's last layers always belong to its front; set back=0."
        else:
            yield from list(no_cut(denoiser, 0)) or _no_inside(denoiser, front)
        yield from compiled_whole(denoiser)


def _too_deep(denoiser: Denoiser, front: int, back: int) -> Iterator[str]:
    """Complain when front and back leave no block between them."""
    count = sum(len(denoiser.stack(stack)) for stack in denoiser.spec.stacks)
    if front + back < count:
        return
    has = f"{denoiser.spec.model_class} has only {count} block{'s' if count > 1 else ''}"
    if (largest := count - 1 - back) >= 1:
        yield f"{has}, so front={front} leaves nothing to reuse; the largest front that works here is {largest}."
    elif back and count > 1:
        yield f"{has}, so back={back} leaves nothing to reuse; the largest back that works here is {count - 2}."
    else:
        yield f"{has}, so nothing is left to reuse."


def _no_inside(denoiser: Denoiser, front: int) -> Iterator[str]:
    """Complain when no layer of a U-Net lies inside its front."""
    if front > (largest := len(cuts(denoiser)) - 1):
        yield (
            f"this U-Net has no {front} outer down layers to compute first; the largest front that works here "
            f"is {largest}."
        )
