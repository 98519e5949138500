"""The contract under regional compilation: no additional graphs, no graph breaks, no recompilation."""

from __future__ import annotations

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
FULL_SET = ("stable_diffusion", "dit", "flux")


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


@pytest.mark.parametrize("architecture", FULL_SET)
@pytest.mark.parametrize("name", [name for name in TECHNIQUES if name != "CompileBlocks"])
def test_a_technique_adds_no_graphs(name: str, architecture: str) -> None:
    rig = make(architecture)
    if resolve(Recipe((COMPILE, trial(name))), Target.of(rig)).refusals:
        pytest.skip("refused; see the composition table")
    plain, _ = graphs(make(architecture))
    first, last = graphs(rig, name)
    allowed = 2 * plain if type(trial(name)).cuts_blocks else plain
    assert first <= allowed, f"{first} graphs instead of {plain}"
    assert last == first, "recompiled in a later request"
