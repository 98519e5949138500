"""What regional and whole-model compilation share: back-end, sizes, adapters, other parts and the cache on disk."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from hasten.compilation.artifacts import ArtifactStore, store_for
from hasten.compilation.compiler import CompileCounter, call_block, missing_tools, mode_options, own_code
from hasten.compilation.lora import EqualRank, lora_problems
from hasten.compilation.parts import Part, decoder, missing_parts, text_encoders
from hasten.compilation.sizes import ANY, Sizes, check_buckets, parse_size
from hasten.core.errors import InvalidSetting, NotEngaged
from hasten.core.intercept import base_class
from hasten.core.patch import Patch
from hasten.core.session import Session, applied_to
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload

_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which inductor records CUDA graphs. One block's graph serves all its equals, and the second replay destroys
what the first put out (seen with PyTorch 2.11 on FLUX); the calls of a step's guidance branches do the same."""


@dataclass(frozen=True, kw_only=True)
class Compile(Technique):
    """The base of both. A subclass says which modules of a denoiser and of a text encoder are compiled."""

    stage: ClassVar[Stage] = Stage.COMPILE
    extent: ClassVar[Literal["blocks", "whole"]] = "blocks"
    """What of the denoiser is compiled."""

    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = field(
        default="default", metadata=about("torch.compile mode; the autotuning modes take minutes and rarely gain")
    )
    dynamic: bool | None = field(
        default=None, metadata=about("True compiles for any size, None once the size has changed, False never")
    )
    fullgraph: bool = field(
        default=True, metadata=about("raise where a part cannot be captured whole; text encoders may always be split")
    )
    backend: str = field(default="inductor", metadata=about("torch.compile back-end", trial="eager"))
    parts: tuple[Part, ...] = field(
        default=("denoiser",), metadata=about("what is compiled: denoiser, vae (its decoder), text_encoder")
    )
    buckets: tuple[str, ...] = field(
        default=(),
        metadata=about("sizes such as '1024x1024' that get code of their own; all other sizes then share one"),
    )
    lora_rank: int = field(
        default=0, metadata=about("largest rank of LoRA adapters that are swapped without compiling anew", ge=0)
    )
    keep: bool = field(
        default=True, metadata=about("keep compiled code in the user's cache folder for the next process")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for size in self.buckets:
            parse_size(size)
        if self.buckets and self.dynamic is not None:
            raise InvalidSetting(f"{type(self).__name__}: buckets settle the sizes; leave dynamic out.")
        if not self.parts:
            raise InvalidSetting(f"{type(self).__name__}(parts=()): name at least one part.")

    def claims(self) -> tuple[str, ...]:
        """The graphs of the denoiser."""
        return ("graph",)

    def denoiser_pieces(self, module: nn.Module, repeated: tuple[str, ...]) -> Iterator[nn.Module]:
        """What is compiled of a denoiser, each by itself."""
        raise NotImplementedError

    def encoder_pieces(self, encoder: nn.Module) -> Iterator[nn.Module]:
        """What is compiled of a text encoder."""
        raise NotImplementedError

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a compiler on this machine, and the parts it is to compile."""
        yield from missing_tools(self.backend, target.device)
        if self.backend not in (known := torch.compiler.list_backends(exclude_tags=())):
            yield f"there is no torch.compile back-end {self.backend!r}; available: {', '.join(known)}."
        if target.device.type == "cuda" and self.backend == "inductor" and self.mode in _GRAPHS:
            yield (
                f"mode={self.mode!r} replays CUDA graphs, in which equal blocks overwrite each other's results; "
                f"use mode='default' and add CudaGraphs() to the recipe."
            )
        yield from missing_parts(target, self.parts)
        for denoiser in target.denoisers:
            yield from check_buckets(self.buckets, denoiser, target)
        if self.lora_rank:
            yield from lora_problems((d.module for d in target.denoisers), self.lora_rank)

    def apply(self, target: Target, patch: Patch) -> None:
        """Give every piece a compiled call."""
        store = self._load(target)
        counter, sizes = patch.keep(CompileCounter()), patch.keep(Sizes(self.buckets, target))
        backend = counter.around(self.backend, mode_options(self.mode) if self.backend == "inductor" else {})
        code = _Code(self, backend, sizes)
        if "denoiser" in self.parts:
            self._prepare(target, patch, sizes)
            for denoiser in target.denoisers:
                for piece in self.denoiser_pieces(denoiser.module, denoiser.spec.repeated_blocks):
                    code.install(piece, patch, lambda args: sizes.present)
        if "vae" in self.parts and (network := decoder(target)) is not None:
            code.install(network, patch, lambda args: sizes.of_latents(args[0]) if args else ANY)
        if "text_encoder" in self.parts:
            for _, encoder in text_encoders(target):
                for piece in self.encoder_pieces(encoder):
                    code.install(piece, patch, lambda args: "text", whole=False)
        if store is not None:
            _save_at_the_end(patch.keep(store), counter, patch, target)

    def _prepare(self, target: Target, patch: Patch, sizes: Sizes) -> None:
        """Watch the sizes of calls, and keep adapters at one rank."""
        for denoiser in target.denoisers:
            if self.buckets:
                patch.around(denoiser.module, sizes.watching(denoiser), "the size of each call is noted")
            if self.lora_rank:
                adapters = patch.keep(EqualRank(denoiser.module, self.lora_rank))
                adapters.prepare()
                patch.undo(denoiser.module, "LoRA adapters are kept at one rank", adapters.restore)
                patch.around(denoiser.module, adapters, "LoRA adapters loaded later are prepared")

    @property
    def keeps_code(self) -> bool:
        """Is compiled code kept on disk? Other back-ends than inductor have none."""
        return self.keep and self.backend == "inductor"

    def _load(self, target: Target) -> ArtifactStore | None:
        if not self.keeps_code:
            return None
        store = store_for(target, applied_to(target.denoisers[0].module))
        store.load()
        return store

    def engaged(self, session: Session) -> Evidence:
        """Graphs were compiled and called."""
        counter = session.state(self, CompileCounter)
        if not counter.calls:
            raise NotEngaged("no compiled code was called.")
        words = counter.in_words()
        if self.buckets:
            calls = session.state(self, Sizes).calls
            words += "; calls: " + ", ".join(f"{calls.get(size, 0)} at {size}" for size in (*self.buckets, ANY))
        return Evidence(summary=words)

    def cost(self, target: Target, workload: Workload) -> Cost:
        """The passes between products become few kernels; memory does not grow."""
        return Cost(compiled=self.extent) if "denoiser" in self.parts else Cost(basis="measured")


class _Code:
    """The compiled functions of one session: one for each class of pieces and each declared size."""

    def __init__(self, technique: Compile, backend: Callable[..., Any], sizes: Sizes) -> None:
        self._technique, self._backend, self._sizes = technique, backend, sizes
        self._runs: dict[tuple[type, str, bool], Callable[..., Any]] = {}

    def install(
        self, module: nn.Module, patch: Patch, size: Callable[[tuple[Any, ...]], str], *, whole: bool = True
    ) -> None:
        kind, run = base_class(module), self._run

        def call(*args: Any, **kwargs: Any) -> Any:
            return run(kind, size(args), whole)(module, *args, **kwargs)

        patch.set(module, "_compiled_call_impl", call, "is compiled")

    def _run(self, kind: type, size: str, whole: bool) -> Callable[..., Any]:
        key = (kind, size, whole)
        if key not in self._runs:
            wanted = self._technique
            dynamic = True if wanted.buckets and size == ANY else wanted.dynamic
            self._runs[key] = torch.compile(
                own_code(call_block), backend=self._backend, fullgraph=wanted.fullgraph and whole, dynamic=dynamic
            )
        return self._runs[key]


def _save_at_the_end(store: ArtifactStore, counter: CompileCounter, patch: Patch, target: Target) -> None:
    """Write what was compiled when the session is left, or for good at the end of the process."""
    save = weakref.finalize(patch, lambda: store.save(counter.graphs, counter.cached))
    patch.undo(target.denoisers[0].module, "compiled code is kept for the next process", save)
