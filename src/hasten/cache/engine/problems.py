"""Sentences for denoisers that lack what a cache needs."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.cache.engine.branches import blocks
from hasten.cache.engine.deep_feature import cuts, obstacles
from hasten.core.intercept import base_class
from hasten.core.sampler import adds_noise
from hasten.core.schedulers import kind_of
from hasten.core.target import Denoiser, Target


def no_stack(denoiser: Denoiser, *, more_than: int = 0) -> Iterator[str]:
    """Complain about a denoiser without a declared stack of more than so many blocks."""
    count = sum(len(denoiser.stack(stack)) for stack in denoiser.spec.stacks)
    if denoiser.spec.unet is not None:
        yield "a U-Net has no chain of equal blocks; DeepCache and FirstBlockCache are caches for U-Nets."
    elif not denoiser.spec.stacks:
        yield f"hasten does not know the blocks of {denoiser.spec.model_class}; add a specification for it."
    elif count <= more_than:
        has = f"{count} block{'s' if count > 1 else ''}"
        yield f"{denoiser.spec.model_class} has only {has}, so nothing is left to reuse."


def no_branches(denoiser: Denoiser) -> Iterator[str]:
    """Complain about a denoiser whose blocks have no declared branches, or run them in chunks."""
    yield from no_stack(denoiser)
    if not denoiser.spec.stacks:
        return
    if not any(stack.branches for stack in denoiser.spec.stacks):
        yield f"the specification of {denoiser.spec.model_class} names no branches; use FirstBlockCache."
    elif any(getattr(block, "_chunk_size", None) for _, block in blocks(denoiser)):
        yield "the feed-forward runs in chunks, so no single output can be kept; switch chunking off."


def no_cut(denoiser: Denoiser, branch: int) -> Iterator[str]:
    """Complain about a denoiser that is no U-Net, or that cannot be cut at this branch."""
    if denoiser.spec.unet is None:
        yield f"{denoiser.spec.model_class} is no U-Net; FirstBlockCache is the cache for transformers."
        return
    found = list(obstacles(denoiser))
    yield from found
    if not found and branch >= (count := len(cuts(denoiser))):
        yield f"this U-Net has no branch {branch}; choose one from 0 to {count - 1}."


def compiled_whole(denoiser: Denoiser) -> Iterator[str]:
    """Complain about a denoiser inside whose single graph nothing can be decided."""
    if denoiser.module._compiled_call_impl is not None:
        yield f"{denoiser.spec.model_class} is compiled as a whole; compile its blocks instead (CompileBlocks)."


def noisy_sampler(target: Target) -> Iterator[str]:
    """Complain about a scheduler that is known to add noise at each step, so that nothing moves smoothly."""
    scheduler = target.scheduler
    if kind_of(scheduler) is not None and adds_noise(scheduler, {}):
        name = base_class(scheduler).__name__
        yield f"{name} adds noise at each step, which no forecast foresees; use FORA, or a sampler that adds none."
