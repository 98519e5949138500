"""The parts of a pipeline that can be compiled beside the denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import nn

from hasten.core.intercept import base_class
from hasten.core.target import Target

Part = Literal["denoiser", "vae", "text_encoder"]


def decoder(target: Target) -> nn.Module | None:
    """The network in the VAE that turns latents into a picture."""
    found = getattr(target.vae, "decoder", None)
    return found if isinstance(found, nn.Module) else None


def text_encoders(target: Target) -> Iterator[tuple[str, nn.Module]]:
    """The pipeline's text encoders by name."""
    for name, part in target.modules.items():
        if name.startswith("text_encoder"):
            yield name, part


def repeated_layers(module: nn.Module) -> Iterator[nn.Module]:
    """The members of its outermost lists of equal layers, such as the blocks of a text encoder."""
    if isinstance(module, nn.ModuleList) and len(module) > 1 and len({base_class(layer) for layer in module}) == 1:
        yield from module
        return
    for child in module.children():
        yield from repeated_layers(child)


def missing_parts(target: Target, parts: tuple[str, ...]) -> Iterator[str]:
    """Say which parts this pipeline does not have."""
    if "vae" in parts and decoder(target) is None:
        yield f"{target.title} has no VAE decoder to compile; leave 'vae' out of parts."
    if "text_encoder" in parts and not any(text_encoders(target)):
        yield f"{target.title} has no text encoder to compile; leave 'text_encoder' out of parts."
