"""The site of caches that decide before any block has run."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.cache.engine.deep_feature import DeepFeatureSite, cuts
from hasten.cache.engine.problems import compiled_whole, no_cut, no_stack
from hasten.cache.engine.site import Site
from hasten.cache.engine.stack import StackSite
from hasten.core.target import Denoiser, Target


def whole_site(denoiser: Denoiser) -> Site:
    """All blocks; of a U-Net, everything but its last layer, which needs what the first convolution puts out."""
    if denoiser.spec.unet is not None:
        return DeepFeatureSite(denoiser, cuts(denoiser)[0])
    return StackSite(denoiser, front=0)


def no_whole(target: Target) -> Iterator[str]:
    """Complain about denoisers without known blocks or stages, or whose blocks cannot be left out."""
    for denoiser in target.denoisers:
        if denoiser.spec.unet is not None:
            yield from no_cut(denoiser, 0)
        else:
            yield from no_stack(denoiser)
            yield from compiled_whole(denoiser)
