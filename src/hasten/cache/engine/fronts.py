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
            yield from no_stack(denoiser, more_than=front + back)
        elif back:
            yield "a U-Net's last layers always belong to its front; set back=0."
        else:
            yield from no_cut(denoiser, front)
        if front:
            yield from compiled_whole(denoiser)
