"""Whole-model compilation: the denoiser's call becomes one graph, fused across blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import nn

from hasten.compilation.compile import Compile
from hasten.compilation.compiler import call_block
from hasten.core.patch import Patch
from hasten.core.target import Target
from hasten.core.technique import Seal


@dataclass(frozen=True, kw_only=True)
class CompileWhole(Compile):
    """Compiles each denoiser as one graph with torch.compile.

    Fuses also what lies between blocks, which pays on U-Nets, whose repeated blocks are the smaller part of the
    work; set-up grows with the number of blocks (minutes). A cache that decides before the call has two graphs, one for
    computing and one for reusing; one that decides in its middle is refused.
    """

    seals: ClassVar[Seal] = "compiled"
    extent: ClassVar[Literal["blocks", "whole"]] = "whole"
    paper: ClassVar[str] = "https://docs.pytorch.org/docs/stable/generated/torch.compile.html"

    def apply(self, target: Target, patch: Patch) -> None:
        """Give every denoiser a compiled call, made after a plain one whose result is not used."""
        super().apply(target, patch)
        if "denoiser" in self.parts:
            for denoiser in target.denoisers:
                patch.around(denoiser.module, _FirstCall(denoiser.module), "runs plainly once before it is compiled")

    def denoiser_pieces(self, module: nn.Module, repeated: tuple[str, ...]) -> Iterator[nn.Module]:
        """The denoiser itself."""
        yield module

    def encoder_pieces(self, encoder: nn.Module) -> Iterator[nn.Module]:
        """The encoder itself."""
        yield encoder


class _FirstCall:
    """Runs a network once as it is: some make tables in their first call by means that no graph can hold (Z-Image)."""

    def __init__(self, module: nn.Module) -> None:
        self._module: nn.Module | None = module

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._module is not None:
            call_block(self._module, *args, **kwargs)
            self._module = None
        return call(*args, **kwargs)
