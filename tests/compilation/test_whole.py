"""Whole-model compilation: one graph, two with a cache that decides beforehand, none for one that decides within."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest
import torch

from hasten.cache import FORA, DBCache, DeepCache, FirstBlockCache, OutputForecast, StepMask, TeaCache
from hasten.compilation import CompileWhole
from hasten.compilation.compiler import CompileCounter
from hasten.core.recipe import Recipe
from hasten.core.resolve import resolve
from hasten.core.target import Target
from hasten.core.technique import Technique
from tests.contract.rigs import ARCHITECTURES, make, plain_output

WHOLE = CompileWhole(backend="eager")


@pytest.fixture(autouse=True)
def fresh() -> Generator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


def counted(architecture: str, *others: Technique) -> tuple[int, int, int]:
    """Graphs after the first request and after three, and how often one was compiled anew later."""
    rig = make(architecture)
    with rig.accelerated(WHOLE, *others) as session:
        rig.run(steps=8)
        counter = session.state(WHOLE, CompileCounter)
        first = counter.graphs
        rig.run(steps=6, prompt=1)
        rig.run(steps=9, prompt=2)
        return first, counter.graphs, counter.calls


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "sdxl"])  # the same U-Net
def test_one_graph_holds_the_denoiser(architecture: str) -> None:
    first, last, calls = counted(architecture)
    assert first == last == 1
    assert calls == 23 * (2 if make(architecture).spec.guidance == "separate" else 1)


@pytest.mark.parametrize(
    ("architecture", "cache"),
    [("flux", FORA()), ("flux", StepMask()), ("dit", FORA()), ("stable_diffusion", DeepCache(interval=2))],
)
def test_a_fixed_schedule_has_one_graph_for_computing_and_one_for_reusing(architecture: str, cache: Technique) -> None:
    first, last, calls = counted(architecture, cache)
    assert first == last == 2
    assert calls == 23


@pytest.mark.parametrize("architecture", ["flux", "stable_diffusion"])
def test_a_cache_of_whole_outputs_runs_no_graph_on_reused_steps(architecture: str) -> None:
    first, last, calls = counted(architecture, OutputForecast.trial())
    assert first == last == 1
    assert calls < 23


@pytest.mark.parametrize("cache", [FirstBlockCache(), DBCache.trial(), TeaCache.trial()])
def test_a_decision_in_the_middle_is_refused_before_anything_is_compiled(cache: Technique) -> None:
    rig = make("flux")
    (reason,) = resolve(Recipe((WHOLE, cache)), Target.of(rig)).refusals
    assert reason == (
        f"{type(cache).__name__} decides in the middle of the denoiser's call, which CompileWhole makes one graph; "
        f"use CompileBlocks, or a cache with a fixed schedule."
    )
    assert rig.denoiser._compiled_call_impl is None


def test_the_users_own_compilation_comes_back() -> None:
    rig: Any = make("dit")
    rig.denoiser.compile(backend="eager")
    before = rig.denoiser._compiled_call_impl
    with rig.accelerated(WHOLE):
        assert rig.denoiser._compiled_call_impl is not before
        rig.run(steps=1)
    assert rig.denoiser._compiled_call_impl is before


def test_the_first_picture_is_like_the_others() -> None:
    rig = make("z_image")
    with rig.accelerated(CompileWhole(backend="aot_eager")):
        first = rig.run(steps=2)
        assert torch.equal(rig.run(steps=2), first)
    torch.testing.assert_close(first, plain_output("z_image", steps=2), atol=1e-4, rtol=1e-3)
