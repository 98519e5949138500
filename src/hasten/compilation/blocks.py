"""Regional compilation: each repeated block is compiled once, whichever architecture it belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from hasten.compilation.compile import Compile
from hasten.compilation.parts import repeated_layers
from hasten.core.intercept import base_class
from hasten.core.target import Target


@dataclass(frozen=True, kw_only=True)
class CompileBlocks(Compile):
    """Compiles the repeated blocks in place with torch.compile, so that equal blocks share one graph.

    Set-up takes seconds instead of the minutes of compiling the whole model, and the next process finds the compiled
    code on disk. Works also where diffusers' `compile_repeated_blocks` raises because the model names no repeated
    blocks (SD3, DiT, PixArt). `hasten.warm_up` compiles the declared sizes before the first picture.
    """

    paper: ClassVar[str] = "https://docs.pytorch.org/tutorials/recipes/regional_compilation.html"

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a compiler on this machine and repeated blocks in the model."""
        yield from super().problems(target)
        for denoiser in target.denoisers:
            if not any(denoiser.of_class(*denoiser.spec.repeated_blocks)):
                yield f"hasten does not know the repeated blocks of {denoiser.spec.model_class}."

    def denoiser_pieces(self, module: nn.Module, repeated: tuple[str, ...]) -> Iterator[nn.Module]:
        """Every repeated block."""
        return (part for part in module.modules() if base_class(part).__name__ in repeated)

    def encoder_pieces(self, encoder: nn.Module) -> Iterator[nn.Module]:
        """Every layer."""
        return repeated_layers(encoder)
