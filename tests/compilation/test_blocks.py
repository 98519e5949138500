"""Regional compilation: one graph a block class, whatever the number of blocks, sessions and requests."""

from __future__ import annotations

import shutil
from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported

from hasten.cache import FirstBlockCache
from hasten.compilation import CompileBlocks
from hasten.compilation.compiler import CompileCounter, cpp_compiler
from hasten.core.errors import NotEngaged, Refused
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from hasten.core.target import Target
from tests.contract.rigs import Rig, make, plain_output

EAGER = CompileBlocks(backend="eager")


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


def dit(layers: int) -> Rig:
    spec = specs()["dit"]
    return Rig(spec, spec.build({**spec.tiny, "num_layers": layers}), make("dit").vae)


@pytest.mark.skipif(shutil.which(cpp_compiler()) is None, reason="inductor needs a C++ compiler on the CPU")
def test_inductor_really_compiles() -> None:
    rig, technique = dit(1), CompileBlocks()
    plain = rig.run()
    before = Counter(torch._dynamo.utils.counters["inductor"])
    with rig.accelerated(technique) as session:
        output = rig.run()
        counter = session.state(technique, CompileCounter)
        assert (counter.graphs, counter.calls) == (1, 4)
        assert counter.seconds > 0.01
        assert "1 graphs compiled in" in session.describe()
    assert Counter(torch._dynamo.utils.counters["inductor"]) - before, "inductor took no part"
    torch.testing.assert_close(output, plain, atol=1e-4, rtol=1e-3)
    assert torch.equal(rig.run(), plain)


def test_the_number_of_graphs_does_not_depend_on_the_number_of_blocks() -> None:
    graphs: list[int] = []
    for layers in (2, 6):
        rig = dit(layers)
        with rig.accelerated(EAGER) as session:
            rig.run(steps=2)
            graphs.append(session.state(EAGER, CompileCounter).graphs)
            assert session.state(EAGER, CompileCounter).calls == 2 * layers
    # Two: what enters the first block is laid out differently from what the others hand on.
    assert graphs == [2, 2]


def test_many_sessions_in_one_process() -> None:
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(12):
            rig = dit(1)
            with rig.accelerated(EAGER) as session:
                rig.run(steps=1)
                assert session.state(EAGER, CompileCounter).graphs == 1
                assert session.state(EAGER, CompileCounter).calls == 1


def test_two_sessions_one_after_the_other_on_one_pipeline() -> None:
    rig = make("dit")
    for _ in range(2):
        with rig.accelerated(EAGER) as session:
            output = rig.run()
            assert session.state(EAGER, CompileCounter).graphs == 2
        torch.testing.assert_close(output, plain_output("dit"), atol=1e-5, rtol=1e-5)
        assert torch.equal(rig.run(), plain_output("dit"))


def test_a_compilation_of_the_users_own_comes_back() -> None:
    rig, theirs = dit(1), CompileCounter()
    block = rig.denoiser.get_submodule("transformer_blocks.0")
    block.compile(backend=theirs.around("eager", {}))
    mine = block._compiled_call_impl
    rig.run(steps=1)
    with rig.accelerated(EAGER) as session:
        rig.run(steps=1)
        assert session.state(EAGER, CompileCounter).calls == 1
    assert block._compiled_call_impl is mine
    rig.run(steps=1)
    assert theirs.calls == 2


def test_other_batches_are_compiled_once_more_at_most() -> None:
    rig = dit(1)
    with torch.no_grad(), rig.accelerated(EAGER) as session:
        for batch in (1, 2, 3, 4, 5):
            rig.denoiser(**rig.spec.example(rig.spec.tiny, InputSize(batch=batch)))
        assert session.state(EAGER, CompileCounter).graphs == 2


def test_never_dynamic_compiles_each_size() -> None:
    static = CompileBlocks(backend="eager", dynamic=False)
    rig = dit(1)
    with torch.no_grad(), rig.accelerated(static) as session:
        for batch in (2, 3, 4):
            rig.denoiser(**rig.spec.example(rig.spec.tiny, InputSize(batch=batch)))
        assert session.state(static, CompileCounter).graphs == 3


class Breaking(nn.Module):
    """Prints in the middle, which no graph can hold."""

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return value + 1


def test_a_block_that_cannot_be_captured_whole() -> None:
    rig = dit(1)
    block = rig.denoiser.get_submodule("transformer_blocks.0")
    feed_forward: Any = block.get_submodule("ff")
    feed_forward.net.append(Breaking())
    plain = rig.run(steps=1)
    with rig.accelerated(EAGER), pytest.raises(Unsupported):
        rig.run(steps=1)
    split = CompileBlocks(backend="eager", fullgraph=False)
    with rig.accelerated(split) as session:
        torch.testing.assert_close(rig.run(steps=1), plain, atol=1e-5, rtol=1e-5)
        assert session.state(split, CompileCounter).graphs >= 2


def test_before_a_run_it_is_not_engaged() -> None:
    rig = dit(1)
    with rig.accelerated(EAGER) as session:
        with pytest.raises(NotEngaged, match="no compiled block was called"):
            session.evidence()
        rig.run(steps=1)
        assert session.evidence()[EAGER].summary.startswith("1 graphs compiled in")


def test_a_model_without_known_blocks_is_refused() -> None:
    (reason,) = EAGER.problems(Target.of(nn.Linear(2, 2)))
    assert reason == "hasten does not know the repeated blocks of Linear."
    with pytest.raises(Refused):
        accelerate(nn.Linear(2, 2), EAGER)


def test_blocks_that_a_cache_leaves_out_are_not_called() -> None:
    rig, cache = dit(3), FirstBlockCache(threshold=1e30)
    with rig.accelerated(EAGER, cache) as session:
        rig.run(steps=4)
        assert session.state(EAGER, CompileCounter).calls == 3 + 3 * 1
        assert session.state(EAGER, CompileCounter).graphs == 2
