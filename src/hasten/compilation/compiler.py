"""A counting wrapper around a torch.compile back-end, and what a back-end needs on this machine."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch


@dataclass
class CompileCounter:
    """Counts graphs compiled by one technique, their calls, and the seconds the back-end took."""

    graphs: int = 0
    calls: int = 0
    seconds: float = 0.0

    def around(self, backend: str, options: dict[str, Any]) -> Callable[..., Any]:
        """Return a back-end for torch.compile that delegates to the named one and counts."""

        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            began = time.perf_counter()
            compiled = _compile(backend, graph, inputs, options)
            self.seconds += time.perf_counter() - began
            self.graphs += 1

            def run(*args: Any) -> Any:
                self.calls += 1
                return compiled(*args)

            return run

        return compile_graph


def _compile(backend: str, graph: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
    if backend == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return cast(Callable[..., Any], compile_fx(graph, inputs, config_patches=options))
    from torch._dynamo.backends.registry import lookup_backend

    return cast(Callable[..., Any], lookup_backend(backend)(graph, inputs))


def mode_options(mode: str) -> dict[str, Any]:
    """The inductor settings that a torch.compile mode stands for."""
    if mode == "default":
        return {}
    from torch._inductor import list_mode_options

    return dict(list_mode_options(mode))


def missing_tools(backend: str, device: torch.device) -> Iterator[str]:
    """Say what the back-end lacks on this machine."""
    if backend != "inductor":
        return
    if device.type == "cpu" and not cpp_compiler():
        yield "compiling for the CPU needs a C++ compiler and none was found; install g++ (Debian: apt-get install g++) or set CXX."
    if device.type == "cuda" and not (shutil.which("gcc") or shutil.which("clang") or os.environ.get("CC")):
        yield "compiling for a GPU needs a C compiler for Triton's launcher and none was found; install gcc."


def cpp_compiler() -> str | None:
    """The C++ compiler that inductor would use, or None."""
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if found := shutil.which(name):
            return found
    return None
