"""CudaGraphs: its logic with tapes in place of CUDA graphs, and the real ones where there is a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from hasten.cache import FORA, DeepCache, FirstBlockCache, OutputForecast, StepMask
from hasten.compilation import CompileBlocks, CudaGraphs
from hasten.compilation.recording import RecordedCall, Recorder, Recordings
from hasten.core.errors import NotEngaged, Refused
from hasten.core.recipe import Recipe
from hasten.core.resolve import resolve
from hasten.core.target import Target
from hasten.memory import ModulationTable
from tests.compilation.tape import TapeRecorder
from tests.contract.rigs import ARCHITECTURES, make, plain_output

CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Taped(CudaGraphs):
    """CudaGraphs with tapes, for the CPU."""

    def problems(self, target: Target) -> list[str]:
        return []

    def recorder(self, device: torch.device) -> Recorder:
        return TapeRecorder()


class Network(nn.Module):
    """A small network with a Python setting and a timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.scale, self.calls = 1.0, list[int]()

    def forward(self, sample: torch.Tensor, timestep: Any = 0, extra: Any = None) -> tuple[torch.Tensor]:
        self.calls.append(1)
        return (self.inner(sample) * self.scale + timestep,)


class Case:
    """A recorded network beside its plain self."""

    def __init__(self, *, limit: int = 2, network: nn.Module | None = None) -> None:
        self.network: Any = network or Network()
        self.counts, self.recorder = Recordings(), TapeRecorder()
        self.call = RecordedCall(
            self.network, self.network.forward, self.recorder, self.counts,
            limit=limit, timestep="timestep", device=CPU,
        )  # fmt: skip

    @torch.no_grad()
    def right(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Call both; the recorded one must agree with the plain one."""
        (output,) = self.call(*args, **kwargs)
        assert torch.equal(output, self.network.forward(*args, **kwargs)[0])
        return output


def test_new_inputs_give_new_outputs_and_old_outputs_stay() -> None:
    case = Case()
    outputs = [case.right(torch.full((2, 4), float(n)), timestep=torch.tensor(n)) for n in range(5)]
    assert len({float(output.sum()) for output in outputs}) == 5
    assert len({output.data_ptr() for output in outputs}) == 5
    assert (case.counts.recorded, case.counts.replayed, case.recorder.warmed) == (1, 5, 2)


def test_a_replay_does_not_run_the_network() -> None:
    case = Case()
    for n in range(3):
        case.right(torch.full((2, 4), float(n)))
    before = len(case.network.calls)
    with torch.no_grad():
        case.call(torch.ones(2, 4))
    assert len(case.network.calls) == before


def test_the_callers_tensors_are_neither_kept_nor_changed() -> None:
    case, given = Case(), torch.ones(2, 4)
    output = case.right(given)
    given.add_(1)
    assert not torch.equal(case.right(given), output)
    assert torch.equal(given, torch.full((2, 4), 2.0))


def test_each_size_is_recorded_up_to_the_limit() -> None:
    case = Case(limit=2)
    for batch in (1, 2, 1, 3, 2, 3):
        case.right(torch.ones(batch, 4))
    assert (case.counts.recorded, case.counts.replayed) == (2, 4)
    assert dict(case.counts.plain) == {"max_graphs=2 kinds of calls are recorded": 2}


@pytest.mark.parametrize("by_name", [True, False])
def test_a_timestep_as_a_number_is_no_new_kind_of_call(by_name: bool) -> None:
    case = Case()
    for step in (3, 2, 1):
        if by_name:
            case.right(torch.ones(1, 4), timestep=step)
        else:
            case.right(torch.ones(1, 4), step)
    assert (case.counts.recorded, case.counts.replayed) == (1, 3)


def test_other_values_are_other_kinds_of_calls() -> None:
    case = Case(limit=4)
    for extra in (None, {"scale": 1.0}, {"scale": 2.0}, None):
        case.right(torch.ones(1, 4), extra=extra)
    assert case.counts.recorded == 3
    case.right(torch.ones(1, 4), extra=object())
    assert dict(case.counts.plain) == {"an argument is a object": 1}


def test_weights_changed_in_place_are_seen_and_replaced_ones_recorded_anew() -> None:
    case, given = Case(), torch.ones(1, 4)
    case.right(given)
    with torch.no_grad():
        case.network.inner.weight.mul_(2)
    case.right(given)
    assert (case.counts.recorded, case.counts.changes) == (1, 0)
    case.network.inner.weight.data = torch.ones(4, 4)
    case.right(given)
    case.network.inner = nn.Linear(4, 4)
    case.right(given)
    case.network.scale = 3.0
    case.right(given)
    assert (case.counts.recorded, case.counts.changes) == (4, 3)
    assert "made anew 3 times" in case.counts.in_words()


def test_adapters_switched_on_and_off_are_noticed() -> None:
    peft = pytest.importorskip("peft")
    rig: Any = make("flux")
    rig.denoiser.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
    plain: list[torch.Tensor] = []
    for disabled in (False, True):
        rig.denoiser.disable_adapters() if disabled else rig.denoiser.enable_adapters()
        plain.append(rig.run(steps=3))
    graphs = Taped()
    with rig.accelerated(graphs) as session:
        for disabled in (False, True):
            rig.denoiser.disable_adapters() if disabled else rig.denoiser.enable_adapters()
            assert torch.equal(rig.run(steps=3), plain[disabled])
        assert session.state(graphs, Recordings).changes == 1
        for layer in (m for m in rig.denoiser.modules() if hasattr(m, "lora_A")):
            layer.set_scale("default", 0.5)
        rig.denoiser.enable_adapters()
        scaled = rig.run(steps=3)
    assert torch.equal(rig.run(steps=3), scaled)
    assert not torch.equal(scaled, plain[0])


class Waiting(Network):
    def forward(self, sample: torch.Tensor, timestep: Any = 0, extra: Any = None) -> tuple[torch.Tensor]:
        return (self.inner(sample) * float(sample.sum()),)


def test_a_call_that_waits_for_the_device_is_made_plainly_and_said_so() -> None:
    case = Case(network=Waiting())
    for _ in range(2):
        case.right(torch.ones(1, 4))
    ((reason, count),) = case.counts.plain.items()
    assert reason == "the call cannot be recorded (operation not permitted when stream is capturing)"
    assert (count, case.counts.replayed, case.recorder.recorded) == (2, 0, 1)


class Stepping(Network):
    """Reads something from outside that changes from call to call, as a table of steps would."""

    table = torch.arange(20.0)
    step = [0]

    def forward(self, sample: torch.Tensor, timestep: Any = 0, extra: Any = None) -> tuple[torch.Tensor]:
        return (self.inner(sample) + self.table[self.step[0]],)


def test_what_changes_behind_a_recording_is_found_out() -> None:
    case = Case(network=Stepping())
    for step in range(5):
        case.network.step[0] = step
        case.right(torch.full((1, 4), float(step)))
    (reason,) = case.counts.plain
    assert "something in it changes from step to step" in reason
    assert case.counts.plain[reason] == 4


def test_with_gradients_calls_are_plain() -> None:
    case = Case()
    (output,) = case.call(torch.ones(1, 4))
    assert output.requires_grad
    assert dict(case.counts.plain) == {"gradients are tracked; use torch.no_grad()": 1}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_gives_the_same_picture(architecture: str) -> None:
    rig, graphs = make(architecture), Taped()
    with rig.accelerated(graphs) as session:
        assert torch.equal(rig.run(), plain_output(architecture))
        assert torch.equal(rig.run(steps=3, prompt=1), plain_output(architecture, steps=3, prompt=1))
        counts = session.state(graphs, Recordings)
        assert counts.replayed
        assert not counts.plain
        assert counts.recorded == 1
    assert torch.equal(rig.run(), plain_output(architecture))


@pytest.mark.parametrize("architecture", ["flux", "dit", "z_image"])
def test_each_step_of_a_recording_finds_its_row_of_the_modulation_table(architecture: str) -> None:
    rig, graphs, table = make(architecture), Taped(), ModulationTable()
    with rig.accelerated(table):
        expected = [rig.run(), rig.run(steps=3, prompt=1)]
    with rig.accelerated(table, graphs) as session:
        assert torch.equal(rig.run(), expected[0])
        assert torch.equal(rig.run(steps=3, prompt=1), expected[1])
        counts = session.state(graphs, Recordings)
        assert counts.replayed
        assert (counts.recorded, counts.plain) == (1, {})
        assert "took the outputs" in table.engaged(session).summary


@pytest.mark.parametrize("cache", [FirstBlockCache(), FORA(), StepMask()])
def test_caches_that_leave_out_parts_of_a_call_are_refused(cache: Any) -> None:
    (reason,) = resolve(Recipe((Taped(), cache)), Target.of(make("flux"))).refusals
    assert reason.startswith(f"{type(cache).__name__} leaves out parts of the denoiser's call, which Taped records")


def test_a_u_nets_cache_is_refused_as_well() -> None:
    with pytest.raises(Refused, match="DeepCache leaves out parts"):
        make("stable_diffusion").accelerated(Taped(), DeepCache())


def test_a_cache_of_whole_outputs_goes_along() -> None:
    rig, graphs, cache = make("flux"), Taped(), OutputForecast.trial()
    with rig.accelerated(cache):
        alone = rig.run(steps=8)
    with rig.accelerated(graphs, cache) as session:
        assert torch.equal(rig.run(steps=8), alone)
        assert session.state(graphs, Recordings).replayed < 8


def test_compiled_blocks_are_recorded() -> None:
    rig, graphs = make("dit"), Taped()
    with rig.accelerated(graphs, CompileBlocks(backend="eager")) as session:
        torch.testing.assert_close(rig.run(), plain_output("dit"), atol=1e-5, rtol=1e-5)
        assert len(session.evidence()) == 2


def test_refused_on_the_cpu_in_plain_words() -> None:
    (reason,) = CudaGraphs().problems(Target.of(make("dit")))
    assert reason == (
        "CUDA graphs need an NVIDIA GPU, and the model is on the cpu; CompileBlocks and CompileWhole work here."
    )


def test_without_replays_it_is_not_engaged() -> None:
    rig, graphs = make("dit"), Taped()
    with rig.accelerated(graphs) as session:
        with pytest.raises(NotEngaged, match="the denoiser was not called"):
            session.evidence()
        rig.denoiser(**rig.spec.example(rig.denoiser.config))  # pyright: ignore
        with pytest.raises(NotEngaged, match="gradients are tracked"):
            session.evidence()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("architecture", ["flux", "stable_diffusion", "sdxl", "dit", "z_image"])
def test_on_a_gpu(architecture: str) -> None:
    rig, graphs = make(architecture).to("cuda"), CudaGraphs()
    plain = [rig.run(), rig.run(steps=3, prompt=1)]
    with rig.accelerated(graphs) as session:
        recorded = [rig.run(), rig.run(steps=3, prompt=1)]
        counts = session.state(graphs, Recordings)
        assert counts.replayed == 7 * (2 if rig.spec.guidance == "separate" else 1)
        assert not counts.plain
    for one, other in zip(recorded, plain, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_compiled_blocks_do_not_overwrite_each_other() -> None:
    rig = make("flux").to("cuda")
    plain = rig.run()
    with rig.accelerated(CudaGraphs(), CompileBlocks()):
        for _ in range(2):
            output = rig.run()
            assert (output - plain).norm() < 0.02 * plain.norm()
