"""Regional compilation: one graph a block class, whatever the number of blocks, sessions and requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

import pytest
import torch
from torch import nn
from torch._dynamo.exc import Unsupported

from hasten.cache import FirstBlockCache
from hasten.compilation import CompileBlocks
from hasten.compilation.compiler import CompileCounter, missing_tools
from hasten.core.errors import NotEngaged, Refused
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.target import Target
from tests.contract.rigs import Rig, make

EAGER = CompileBlocks(backend="eager")


@pytest.fixture(autouse=True)
def fresh() -> Generator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


class Block(nn.Module):
    """A small block; with `breaks`, one that no single graph can hold."""

    def __init__(self, breaks: bool) -> None:
        super().__init__()
        self.linear, self.breaks = nn.Linear(4, 4), breaks

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        result = torch.relu(self.linear(value))
        if self.breaks:
            torch._dynamo.graph_break()
        return result + value


class Network(nn.Module):
    """A denoiser of an unknown architecture that names its repeated blocks, as diffusers' models do."""

    _repeated_blocks = ("Block",)

    def __init__(self, blocks: int = 2, breaks: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(breaks) for _ in range(blocks))

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            sample = block(sample)
        return sample


def dit(layers: int) -> Rig:
    spec = specs()["dit"]
    return Rig(spec, spec.build({**spec.tiny, "num_layers": layers}), make("dit").vae)


@pytest.mark.skipif(any(missing_tools("inductor", torch.device("cpu"))), reason="inductor cannot work here")
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


def test_two_sessions_one_after_the_other_on_one_pipeline() -> None:
    rig = dit(1)
    plain = rig.run(steps=1)
    for _ in range(2):
        with rig.accelerated(EAGER) as session:
            torch.testing.assert_close(rig.run(steps=1), plain, atol=1e-5, rtol=1e-5)
            assert session.state(EAGER, CompileCounter).graphs == 1
        assert torch.equal(rig.run(steps=1), plain)


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


def test_many_sessions_in_one_process() -> None:
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        for _ in range(12):
            network, given = Network(), torch.ones(1, 4)
            plain = network(given)
            with accelerate(network, EAGER) as session:
                assert torch.equal(network(given), plain)
                counter = session.state(EAGER, CompileCounter)
                assert (counter.graphs, counter.calls) == (1, 2)


def test_a_compilation_of_the_users_own_comes_back() -> None:
    network, theirs = Network(blocks=1), CompileCounter()
    block = network.blocks[0]
    block.compile(backend=theirs.around("eager", {}))
    compiled_call = block._compiled_call_impl
    network(torch.ones(1, 4))
    with accelerate(network, EAGER) as session:
        network(torch.ones(1, 4))
        assert session.state(EAGER, CompileCounter).calls == 1
    assert block._compiled_call_impl is compiled_call
    network(torch.ones(1, 4))
    assert theirs.calls == 2


@pytest.mark.parametrize(("dynamic", "graphs"), [(None, 2), (False, 5), (True, 2)])
def test_other_batches_are_compiled_as_the_setting_says(dynamic: bool | None, graphs: int) -> None:
    network, technique = Network(), CompileBlocks(backend="eager", dynamic=dynamic)
    with accelerate(network, technique) as session:
        for batch in (1, 2, 3, 4, 5):
            network(torch.ones(batch, 4))
        assert session.state(technique, CompileCounter).graphs == graphs


def test_a_block_that_cannot_be_captured_whole() -> None:
    network, given = Network(breaks=True), torch.ones(1, 4)
    plain = network(given)
    with accelerate(network, EAGER), pytest.raises(Unsupported):
        network(given)
    split = CompileBlocks(backend="eager", fullgraph=False)
    with accelerate(network, split) as session:
        assert torch.equal(network(given), plain)
        assert session.state(split, CompileCounter).graphs == 2
    assert torch.equal(network(given), plain)


def test_before_a_run_it_is_not_engaged() -> None:
    network = Network()
    with accelerate(network, EAGER) as session:
        with pytest.raises(NotEngaged, match="no compiled code was called"):
            session.evidence()
        network(torch.ones(1, 4))
        assert session.evidence()[EAGER].summary.startswith("1 graphs compiled in")
