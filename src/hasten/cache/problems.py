"""Sentences for architectures that lack what a cache needs."""

from __future__ import annotations

from collections.abc import Iterator

from hasten.core.target import Target


def no_stack(target: Target, *, at_least: int = 1) -> Iterator[str]:
    """Complain about denoisers without a declared stack of blocks."""
    for denoiser in target.denoisers:
        blocks = sum(len(denoiser.stack(stack)) for stack in denoiser.spec.stacks)
        if denoiser.spec.unet is not None:
            yield "a U-Net has no chain of equal blocks; DeepCache is the cache for U-Nets."
        elif not denoiser.spec.stacks:
            yield f"hasten does not know the blocks of {denoiser.spec.model_class}; add a specification for it."
        elif blocks < at_least:
            yield f"{denoiser.spec.model_class} has only {blocks} block, so nothing is left to reuse."


def no_unet(target: Target) -> Iterator[str]:
    """Complain about denoisers that are no U-Net."""
    for denoiser in target.denoisers:
        if denoiser.spec.unet is None:
            yield f"{denoiser.spec.model_class} is no U-Net; FirstBlockCache is the cache for transformers."
