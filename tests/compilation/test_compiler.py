"""The counting back-end, code objects of one's own, and what a back-end needs on a machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hasten.compilation import CompileBlocks
from hasten.compilation.compiler import (
    CompileCounter,
    bound,
    call_block,
    cpp_compiler,
    missing_tools,
    mode_options,
    own_code,
)
from hasten.core.errors import Refused
from hasten.core.session import accelerate
from hasten.core.target import Target
from tests.contract.rigs import make

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def no_tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CXX", "CC"):
        monkeypatch.delenv(name, raising=False)


def compiled(counter: CompileCounter, function: Any, backend: str = "eager") -> Any:
    return torch.compile(own_code(function), backend=counter.around(backend, {}), fullgraph=True)


def double(value: torch.Tensor, *, plus: float = 1.0) -> torch.Tensor:
    return value * 2 + plus


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_graphs_and_calls_are_counted(backend: str) -> None:
    counter = CompileCounter()
    run = compiled(counter, double, backend)
    for size in (3, 3, 3):
        assert torch.equal(run(torch.ones(size), plus=0.5), torch.full((size,), 2.5))
    assert (counter.graphs, counter.calls) == (1, 3)
    assert counter.seconds > 0
    run(torch.ones(2, 2))
    assert (counter.graphs, counter.calls) == (2, 4)


def test_each_session_has_graphs_of_its_own() -> None:
    one, other = CompileCounter(), CompileCounter()
    for counter in (one, other):
        compiled(counter, double)(torch.ones(3))
    assert (one.graphs, other.graphs) == (1, 1)
    assert own_code(double).__code__ is not double.__code__
    assert own_code(double)(torch.ones(1)) == double(torch.ones(1))


def test_a_block_runs_as_its_own_call_would_hooks_included() -> None:
    block, seen = nn.Linear(2, 2), list[str]()
    block.register_forward_hook(lambda *_: seen.append("hook"))
    given = torch.ones(1, 2)
    assert torch.equal(bound(call_block, block)(given), block(given))
    assert seen == ["hook", "hook"]


def test_modes_are_inductors_own() -> None:
    assert mode_options("default") == {}
    assert mode_options("reduce-overhead") == {"triton.cudagraphs": True}
    assert mode_options("max-autotune-no-cudagraphs")["max_autotune"] is True


@pytest.mark.usefixtures("no_tools")
def test_a_missing_compiler_is_a_sentence() -> None:
    (cpu,), (cuda,) = missing_tools("inductor", CPU), missing_tools("inductor", CUDA)
    assert cpu.endswith("was not found; install g++ or set CXX to one.")
    assert "C compiler" in cuda
    assert not list(missing_tools("eager", CPU))
    (reason,) = CompileBlocks().problems(Target.of(make("dit")))
    assert reason == cpu
    with pytest.raises(Refused, match=r"CompileBlocks: compiling for the CPU needs a C\+\+ compiler"):
        accelerate(make("dit"), "CompileBlocks()")


@pytest.mark.usefixtures("no_tools")
def test_the_compiler_is_the_one_inductor_would_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "my-compiler"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", "my-compiler")
    assert cpp_compiler() == "my-compiler"
    assert not list(missing_tools("inductor", CPU))
    monkeypatch.setenv("CXX", "another")
    (sentence,) = missing_tools("inductor", CPU)
    assert "'another' was not found" in sentence


def test_a_wrong_cxx_is_not_mended_by_another_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.cpp_builder import cpp_compiler_search
    from torch._inductor.exc import InvalidCxxCompiler

    monkeypatch.setenv("CXX", f"no-such-compiler-{os.getpid()}")
    assert list(missing_tools("inductor", CPU))
    with pytest.raises(InvalidCxxCompiler):
        cpp_compiler_search((cpp_compiler(),))  # pyright: ignore


def test_an_unknown_backend_names_the_known_ones() -> None:
    (reason,) = CompileBlocks(backend="inducter").problems(Target.of(make("dit")))
    assert reason.startswith("there is no torch.compile back-end 'inducter'; available: ")
    assert "inductor" in reason


def test_an_installation_in_a_path_with_a_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", "/my programs/torch/__init__.py")
    assert "a path that contains a space" in " ".join(missing_tools("inductor", CPU))
    assert not list(missing_tools("eager", CPU))


@pytest.fixture(autouse=True)
def installed_in_a_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__file__", "/usr/lib/torch/__init__.py")
