"""Regional compilation: each repeated block is compiled once, whichever architecture it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from hasten.compilation.compiler import CompileCounter, bound, call_block, missing_tools, mode_options, own_code
from hasten.core.errors import NotEngaged
from hasten.core.intercept import base_class
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload

_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which inductor records CUDA graphs. One block's graph serves all its equals, and the second replay destroys
what the first put out (seen with PyTorch 2.11 on FLUX)."""


@dataclass(frozen=True, kw_only=True)
class CompileBlocks(Technique):
    """Compiles the repeated blocks in place with torch.compile, so that equal blocks share one graph.

    Set-up takes seconds instead of the minutes of compiling the whole model. Works also where diffusers'
    `compile_repeated_blocks` raises because the model names no repeated blocks (SD3, DiT, PixArt).
    """

    stage: ClassVar[Stage] = Stage.COMPILE
    paper: ClassVar[str] = "https://docs.pytorch.org/tutorials/recipes/regional_compilation.html"

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = field(
        default="default", metadata=about("torch.compile mode; the autotuning modes take minutes and rarely gain")
    )
    dynamic: bool | None = field(
        default=None, metadata=about("True compiles for any size, None once the size has changed, False never")
    )
    fullgraph: bool = field(default=True, metadata=about("raise where a block cannot be captured whole"))
    backend: str = field(default="inductor", metadata=about("torch.compile back-end", trial="eager"))

    def claims(self) -> tuple[str, ...]:
        """The graphs of the blocks."""
        return ("graph",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a compiler on this machine and repeated blocks in the model."""
        yield from missing_tools(self.backend, target.device)
        if self.backend not in (known := torch.compiler.list_backends(exclude_tags=())):
            yield f"there is no torch.compile back-end {self.backend!r}; available: {', '.join(known)}."
        if target.device.type == "cuda" and self.backend == "inductor" and self.mode in _GRAPHS:
            yield (
                f"mode={self.mode!r} replays CUDA graphs, in which equal blocks overwrite each other's results; "
                f"use mode='default' or 'max-autotune-no-cudagraphs'."
            )
        for denoiser in target.denoisers:
            if not any(denoiser.of_class(*denoiser.spec.repeated_blocks)):
                yield f"hasten does not know the repeated blocks of {denoiser.spec.model_class}."

    def apply(self, target: Target, patch: Patch) -> None:
        """Give every repeated block a compiled call."""
        counter = patch.keep(CompileCounter())
        backend = counter.around(self.backend, mode_options(self.mode) if self.backend == "inductor" else {})
        runs: dict[type, Callable[..., Any]] = {}
        for denoiser in target.denoisers:
            for _, block in denoiser.of_class(*denoiser.spec.repeated_blocks):
                kind = base_class(block)
                runs.setdefault(kind, self._compiled(backend))
                patch.set(block, "_compiled_call_impl", bound(runs[kind], block), "is compiled")

    def _compiled(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(own_code(call_block), backend=backend, fullgraph=self.fullgraph, dynamic=self.dynamic)

    def engaged(self, session: Session) -> Evidence:
        """Graphs were compiled and called."""
        counter = session.state(self, CompileCounter)
        if not counter.calls:
            raise NotEngaged("no compiled block was called.")
        return Evidence(
            summary=f"{counter.graphs} graphs compiled in {counter.seconds:.1f} s and called {counter.calls} times"
        )

    def cost(self, target: Target, workload: Workload) -> Cost:
        """The passes between products become few kernels; memory does not grow."""
        return Cost(compiled="blocks")
