"""A counting wrapper around a torch.compile back-end, and what a back-end needs on this machine."""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn


@dataclass
class CompileCounter:
    """Counts graphs compiled by one technique, their calls, and the seconds the back-end took."""

    graphs: int = 0
    calls: int = 0
    seconds: float = 0.0
    recompilations: int = 0
    """Graphs compiled because an earlier graph of the same code did not fit: another size, setting or adapter."""
    cached: int = 0
    """Graphs whose compiled code was found in a cache."""

    def around(self, backend: str, options: dict[str, Any]) -> Callable[..., Any]:
        """Return a back-end for torch.compile that delegates to the named one and counts."""

        def compile_graph(graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
            began, before = time.perf_counter(), _found_in_cache()
            compiled = _compile(backend, graph, inputs, options)
            self.seconds += time.perf_counter() - began
            self.graphs += 1
            self.recompilations += _is_another_version()
            self.cached += _found_in_cache() > before

            def run(*args: Any) -> Any:
                self.calls += 1
                return compiled(*args)

            return run

        return compile_graph

    def in_words(self) -> str:
        """What was compiled, one clause."""
        facts = [f"{self.recompilations} of them anew for another size or setting"] if self.recompilations else []
        facts += [f"{self.cached} found in the cache"] if self.cached else []
        more = f" ({', '.join(facts)})" if facts else ""
        return f"{self.graphs} graphs compiled in {self.seconds:.1f} s{more} and called {self.calls} times"


def call_block(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run a module as its own call would, hooks included; this is the function that is compiled."""
    return nn.Module._call_impl(block, *args, **kwargs)


_NUMBERS = itertools.count()


def own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of a function with a code object of its own.

    torch.compile keeps graphs per code object, up to a limit of 8, and remembers which sizes have varied by the
    code's file, line and name. With its own, each copy starts with nothing, and its graphs disappear with it.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_NUMBERS)}")
    copied = types.FunctionType(code, function.__globals__, function.__name__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def bound(run: Callable[..., Any], block: nn.Module) -> Callable[..., Any]:
    """The compiled call of one block."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return run(block, *args, **kwargs)

    return call


def _compile(
    backend: str, graph: torch.fx.GraphModule, inputs: list[Any], options: dict[str, Any]
) -> Callable[..., Any]:
    if backend == "inductor":
        from torch._inductor.compile_fx import compile_fx

        return cast(Callable[..., Any], compile_fx(graph, inputs, config_patches=options))
    from torch._dynamo.backends.registry import lookup_backend

    return cast(Callable[..., Any], lookup_backend(backend)(graph, inputs))


def _found_in_cache() -> int:
    """How often PyTorch has found compiled code in its caches so far, in this process."""
    from torch._dynamo.utils import counters

    return counters["aot_autograd"]["autograd_cache_hit"] + counters["inductor"]["fxgraph_cache_hit"]


def _is_another_version() -> bool:
    """Is what is being compiled not the first version of its code?"""
    from torch._guards import CompileContext

    present = CompileContext.try_get()
    number = getattr(getattr(present, "compile_id", None), "frame_compile_id", 0)
    return bool(number)


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
    if device.type == "cpu" and not shutil.which(cpp_compiler()):
        name = repr(cpp_compiler())
        yield f"compiling for the CPU needs a C++ compiler and {name} was not found; install g++ or set CXX to one."
    if device.type == "cpu" and " " in torch.__file__:
        yield "PyTorch, installed in a path that contains a space, cannot compile for the CPU; install it elsewhere."
    if device.type == "cuda" and not (shutil.which("gcc") or shutil.which("clang") or os.environ.get("CC")):
        yield "compiling for a GPU needs a C compiler for Triton's launcher and none was found; install gcc."


def cpp_compiler() -> str:
    """The program that inductor calls: what CXX names, and no other when that one is not there."""
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    return os.environ.get("CXX", usual)
