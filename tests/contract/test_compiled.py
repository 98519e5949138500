"""The contract under regional compilation: no additional graphs, no graph breaks, no recompilation."""

from __future__ import annotations

from collections.abc import Collection
from functools import cache
from typing import Any

import pytest
import torch

from hasten.compilation import CompileBlocks
from hasten.compilation.compiler import CompileCounter
from hasten.core.files import read_json
from hasten.core.registry import techniques
from tests.contract.composition import TABLE
from tests.contract.recorded import refused_pairs
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


def groups(names: list[str], architecture: str) -> list[tuple[str, ...]]:
    """Techniques in groups that go together with compiled blocks; one that cuts blocks stays alone.

    What leaves the graphs of its group as they are leaves them alone, too, and a group costs as much as one technique.
    """
    table: Any = read_json(TABLE)
    of_this = table["architectures"][architecture]
    refused = refused_pairs(of_this)
    found: list[list[str]] = []
    for name in names:
        if name in of_this["alone"] or _refused(refused, name, "CompileBlocks"):
            continue
        fitting = (group for group in found if len(group) < GROUP and _fits(name, group, refused))
        if (group := next(fitting, None)) is not None:
            group.append(name)
        else:
            found.append([name])
    return [tuple(group) for group in found]


GROUP = 3


def _fits(name: str, group: list[str], refused: Collection[tuple[str, str]]) -> bool:
    kinds = techniques()
    whole = not any(kinds[one].cuts_blocks for one in (name, *group))
    return whole and not any(_refused(refused, name, other) for other in group)


def _refused(refused: Collection[tuple[str, str]], one: str, other: str) -> bool:
    return (one, other) in refused or (other, one) in refused


def cases() -> list[tuple[str, tuple[str, ...]]]:
    """Each technique on a U-Net, and on one of two transformers in turn."""
    shares = {"stable_diffusion": OTHERS, "dit": OTHERS[::2], "flux": OTHERS[1::2]}
    return [(architecture, group) for architecture, names in shares.items() for group in groups(names, architecture)]


@pytest.mark.parametrize(("architecture", "names"), cases(), ids=str)
def test_techniques_add_no_graphs(architecture: str, names: tuple[str, ...]) -> None:
    plain = plain_graphs(architecture)
    first, last = graphs(make(architecture), *names)
    allowed = 2 * plain if techniques()[names[0]].cuts_blocks else plain
    assert first <= allowed, f"{first} graphs instead of {plain}"
    assert last == first, "recompiled in a later request"
