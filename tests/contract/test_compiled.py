"""The contract under regional compilation: no additional graphs, no graph breaks, no recompilation."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from hasten.compilation import CompileBlocks
from hasten.compilation.compiler import CompileCounter
from hasten.core.recipe import Recipe
from hasten.core.resolve import resolve
from hasten.core.target import Target
from tests.contract.rigs import ARCHITECTURES, TECHNIQUES, Rig, make, trial

COMPILE = CompileBlocks(backend="eager")
REQUESTS = ((4, 0), (5, 1), (3, 2))
OTHERS = [name for name in TECHNIQUES if name != "CompileBlocks"]


def graphs(rig: Rig, *names: str) -> tuple[int, int]:
    """Graphs after the first request, and after three with other prompts and step counts."""
    torch._dynamo.reset()
    with rig.accelerated(COMPILE, *(trial(name) for name in names)) as session:
        rig.run(steps=REQUESTS[0][0], prompt=REQUESTS[0][1])
        counter = session.state(COMPILE, CompileCounter)
        first = counter.graphs
        for steps, prompt in REQUESTS[1:]:
            rig.run(steps=steps, prompt=prompt)
        assert counter.calls
        return first, counter.graphs


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_blocks_compile_without_recompilation(architecture: str) -> None:
    first, last = graphs(make(architecture))
    assert first == last > 0


@cache
def plain_graphs(architecture: str) -> int:
    """Graphs without any technique."""
    return graphs(make(architecture))[0]


def cases() -> list[tuple[str, str]]:
    """Each technique on a U-Net, and on one of two transformers in turn."""
    found = [(name, "stable_diffusion") for name in OTHERS]
    return found + [(name, ("dit", "flux")[turn % 2]) for turn, name in enumerate(OTHERS)]


@pytest.mark.parametrize(("name", "architecture"), cases())
def test_a_technique_adds_no_graphs(name: str, architecture: str) -> None:
    rig = make(architecture)
    if resolve(Recipe((COMPILE, trial(name))), Target.of(rig)).refusals:
        pytest.skip("refused; see the composition table")
    plain = plain_graphs(architecture)
    first, last = graphs(rig, name)
    allowed = 2 * plain if type(trial(name)).cuts_blocks else plain
    assert first <= allowed, f"{first} graphs instead of {plain}"
    assert last == first, "recompiled in a later request"
