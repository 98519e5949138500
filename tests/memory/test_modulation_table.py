"""ModulationTable answers linears from a table that is rebuilt when, and only when, what it depends on changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hasten
from hasten.cache import FirstBlockCache, SkipGuidance
from hasten.core.errors import InvalidSetting, NotEngaged, Refused
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.memory import ModulationTable, modulation_table
from hasten.memory.engine.modulation import Modulation
from hasten.memory.engine.sizes import in_words
from hasten.memory.engine.table import Condition, timed_linears
from hasten.memory.engine.weights import size_of
from tests.contract.rigs import ARCHITECTURES, Rig, fingerprint, make, plain_output
from tests.memory.simulated import Device, watching

TECHNIQUE = ModulationTable()
Change = Callable[[dict[str, Any]], dict[str, Any]]


class Varied(Rig):
    """A rig whose calls have some arguments changed."""

    def __init__(self, architecture: str, change: Change = dict) -> None:
        rig = make(architecture)
        super().__init__(rig.spec, rig.denoiser, rig.vae)
        self.change = change

    def call(self, arguments: dict[str, Any]) -> Any:
        return super().call(self.change(arguments))


def added(name: str, amount: float) -> Change:
    return lambda given: {**given, name: given[name] + amount}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(modulation_table, "copies_to", lambda place: device)  # pyright: ignore[reportUnknownLambdaType]
    return device


def tables(session: Session) -> list[Modulation]:
    return session.state(TECHNIQUE, modulation_table._Tables).tables


def built(session: Session) -> int:
    return session.state(TECHNIQUE, modulation_table._Tables).counts.tables


def late(session: Session) -> int:
    return session.state(TECHNIQUE, modulation_table._Tables).counts.late_rows


def weights(rig: Rig) -> int:
    return sum(size_of(module) for module in timed_linears(Target.of(rig).denoisers[0]).values())


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_one_table_serves_all_steps_and_weights_pass_by_once(architecture: str, device: Device) -> None:
    rig = make(architecture)
    before, size = fingerprint(rig), weights(rig)
    kept = [value.clone() for value in rig.denoiser.state_dict().values()]
    addresses = [parameter.data_ptr() for parameter in rig.denoiser.parameters()]
    with rig.accelerated(TECHNIQUE) as session:
        [table] = tables(session)
        with watching(device, [slot.unit for slot in table.slots]):
            assert close(rig.run(), plain_output(architecture))
        assert device.bytes == built(session) * size
        assert device.most < size or len(table.slots) <= 2
        assert late(session) == 0
        moved = device.bytes
        rig.run()  # the same again, in new tensors
        assert device.bytes == moved
        assert device.present == 0
        assert f"{in_words(size)} of weights stay off the device" in TECHNIQUE.engaged(session).summary
    assert fingerprint(rig)[1:] == before[1:]
    assert [parameter.data_ptr() for parameter in rig.denoiser.parameters()] == addresses
    assert all(torch.equal(one, two) for one, two in zip(rig.denoiser.state_dict().values(), kept, strict=True))
    assert torch.equal(rig.run(), plain_output(architecture))


def test_the_linears_are_not_run_in_the_steps(device: Device) -> None:
    rig = make("flux")
    with rig.accelerated(TECHNIQUE) as session:
        ran: list[str] = []
        for slot in tables(session)[0].slots:
            slot.module.register_forward_pre_hook(
                lambda module, given, path=slot.path: ran.append(f"{path} {len(given[0])}")
            )
        rig.run(steps=5)
        # One product a linear for all five steps, none in any step.
        assert ran == [f"{slot.path} 5" for slot in tables(session)[0].slots]


REBUILT: dict[str, tuple[str, Change]] = {
    "guidance": ("flux", added("guidance", 1.5)),
    "pooled text": ("flux", added("pooled_projections", 0.5)),
    "pooled text of SD3": ("sd3", added("pooled_projections", 0.5)),
    "class": ("dit", lambda given: {**given, "class_labels": (given["class_labels"] + 1) % 10}),
}


@pytest.mark.parametrize("case", REBUILT)
def test_it_is_rebuilt_when_a_condition_changes(case: str, device: Device) -> None:
    architecture, change = REBUILT[case]
    expected = Varied(architecture, change).run()
    assert not close(expected, plain_output(architecture)), "the change must matter"
    rig = Varied(architecture)
    with rig.accelerated(TECHNIQUE) as session:
        assert close(rig.run(), plain_output(architecture))
        rig.change = change
        assert close(rig.run(), expected)
        assert (built(session), device.bytes) == (2, 2 * weights(rig))
        rig.change = dict
        assert close(rig.run(), plain_output(architecture))
        assert built(session) == 2, "two tables are kept"
        assert late(session) == 0


@pytest.mark.parametrize("architecture", ["flux", "dit", "z_image", "stable_diffusion"])
def test_it_is_rebuilt_when_the_steps_change(architecture: str, device: Device) -> None:
    rig = make(architecture)
    with rig.accelerated(TECHNIQUE) as session:
        for number, steps in enumerate((4, 7, 3), 1):
            assert close(rig.run(steps=steps), plain_output(architecture, steps=steps))
            assert built(session) == number
            assert device.bytes == number * weights(rig)
        assert late(session) == 0


@pytest.mark.parametrize("architecture", ["z_image", "stable_diffusion", "wan", "qwen_image", "pixart"])
def test_it_is_not_rebuilt_for_what_it_does_not_depend_on(architecture: str, device: Device) -> None:
    """Another prompt, where the linears see the timestep alone."""
    rig = make(architecture)
    with rig.accelerated(TECHNIQUE) as session:
        rig.run()
        count = built(session)
        assert close(rig.run(prompt=1), plain_output(architecture, prompt=1))
        assert close(rig.run(prompt=2), plain_output(architecture, prompt=2))
        assert built(session) == count
    assert device.bytes == count * weights(rig)


def test_flux_is_not_rebuilt_for_other_tokens_and_noise(device: Device) -> None:
    change = added("encoder_hidden_states", 0.5)
    expected, rig = Varied("flux", change).run(), Varied("flux")
    with rig.accelerated(TECHNIQUE) as session:
        rig.run()
        rig.change = change
        assert close(rig.run(), expected)
        assert built(session) == 1


def test_conditions_written_into_their_tensors(device: Device) -> None:
    """The same tensor with other values is another condition, inside a request too."""
    pooled: list[torch.Tensor] = []

    def shared(given: dict[str, Any]) -> dict[str, Any]:
        pooled[:] = pooled or [given["pooled_projections"].clone()]
        return {**given, "pooled_projections": pooled[0]}

    def outputs(rig: Varied) -> list[torch.Tensor]:
        found = [rig.run()]
        pooled[0].add_(0.5)
        found.append(rig.run())
        pooled.clear()
        return found

    expected, rig = outputs(Varied("flux", shared)), Varied("flux", shared)
    with rig.accelerated(TECHNIQUE) as session:
        for one, other in zip(outputs(rig), expected, strict=True):
            assert close(one, other)
        assert built(session) == 2


def test_a_condition_that_changes_in_mid_request_is_noticed(device: Device) -> None:
    calls: list[int] = []

    def drifting(given: dict[str, Any]) -> dict[str, Any]:
        calls.append(0)
        return {**given, "pooled_projections": given["pooled_projections"] + 0.1 * len(calls)}

    expected = Varied("flux", drifting).run()
    calls.clear()
    rig = Varied("flux", drifting)
    with rig.accelerated(TECHNIQUE) as session:
        assert close(rig.run(), expected)
        assert late(session) == 3, "all steps but the first"


@pytest.mark.parametrize("form", [lambda t: t / 1000, lambda t: (1000 - t) / 1000], ids=["divided", "turned round"])
def test_timesteps_as_pipelines_hand_them_on(form: Callable[[torch.Tensor], torch.Tensor], device: Device) -> None:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "timestep": form(given["timestep"])}

    expected, rig = Varied("flux", change).run(), Varied("flux", change)
    with rig.accelerated(TECHNIQUE) as session:
        assert close(rig.run(), expected)
        assert (built(session), late(session)) == (1, 0)


def test_timesteps_in_a_form_of_their_own_are_learned(device: Device) -> None:
    def change(given: dict[str, Any]) -> dict[str, Any]:
        return {**given, "timestep": given["timestep"] * 0.37 + 1}

    expected, rig = Varied("flux", change).run(), Varied("flux", change)
    with rig.accelerated(TECHNIQUE) as session:
        assert close(rig.run(), expected)
        assert late(session) == 3, "the first request cannot know the steps to come"
        for _ in range(2):
            assert close(rig.run(), expected)
        assert (built(session), late(session)) == (2, 3)
        rig.change = lambda given: added("guidance", 1.0)(change(given))
        assert close(rig.run(), Varied("flux", rig.change).run())
        assert (built(session), late(session)) == (3, 3)


def test_another_scheduler_form_for_a_known_schedule_is_noticed(device: Device) -> None:
    rig = Varied("flux")
    change = added("timestep", 2.0)
    expected = Varied("flux", change).run()
    with rig.accelerated(TECHNIQUE) as session:
        rig.run()
        rig.change = change
        assert close(rig.run(), expected)
        assert late(session) == 4
        rig.run()
        learned = late(session)
        assert close(rig.run(), expected)
        assert late(session) == learned


def test_the_very_same_tensors_are_not_compared(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing would wait for the GPU."""
    rig, given = make("flux"), list[dict[str, Any]]()
    given += rig._calls(0)
    monkeypatch.setattr(rig, "_calls", lambda prompt: given)  # pyright: ignore[reportUnknownLambdaType]
    with rig.accelerated(TECHNIQUE) as session:
        rig.run()
        monkeypatch.setattr(Condition, "equal", lambda *_: pytest.fail("waited"))  # pyright: ignore
        assert close(rig.run(), plain_output("flux"))
        assert built(session) == 1


@pytest.mark.parametrize("architecture", ["stable_diffusion", "dit", "wan"])
def test_half_of_a_guided_batch(architecture: str, device: Device) -> None:
    skip = SkipGuidance(interval=2)
    alone, rig = make(architecture), make(architecture)
    with alone.accelerated(skip):
        expected = alone.run(steps=8)
    with rig.accelerated(skip, TECHNIQUE) as session:
        assert close(rig.run(steps=8), expected)
        assert len(session.evidence()) == 2
        assert late(session) == 0


def test_a_cache_beside_it(device: Device) -> None:
    cache = FirstBlockCache(threshold=1e9)
    alone, rig = make("flux"), make("flux")
    with alone.accelerated(cache):
        expected = alone.run()
    with rig.accelerated(cache, TECHNIQUE) as session:
        assert close(rig.run(), expected)
        assert late(session) == 0


def test_inference_mode(device: Device) -> None:
    rig = make("flux")
    with rig.accelerated(TECHNIQUE) as session:
        for _ in range(2):
            with torch.inference_mode():
                assert close(rig.run(), plain_output("flux"))
        assert close(rig.run(), plain_output("flux"))
        assert built(session) == 1
    assert torch.equal(rig.run(), plain_output("flux"))


def test_an_exception_in_a_step(device: Device) -> None:
    rig = make("flux")
    block: Any = rig.denoiser.get_submodule("single_transformer_blocks.1")
    with rig.accelerated(TECHNIQUE) as session:
        handle = block.proj_mlp.register_forward_pre_hook(_fail)
        with pytest.raises(ZeroDivisionError):
            rig.run()
        handle.remove()
        assert all(slot.value is None and not slot.unit.uses for slot in tables(session)[0].slots)
        assert close(rig.run(steps=3), plain_output("flux", steps=3))
    assert torch.equal(rig.run(), plain_output("flux"))


def test_running_out_of_memory_while_the_table_is_made(device: Device) -> None:
    rig, begin, left = make("flux"), device.begin, [2]

    def short(sources: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("out of memory")
        return begin(sources)

    with rig.accelerated(TECHNIQUE) as session:
        device.begin = short  # pyright: ignore[reportAttributeAccessIssue]
        with pytest.raises(torch.OutOfMemoryError):
            rig.run()
        device.begin = begin  # pyright: ignore[reportAttributeAccessIssue]
        assert close(rig.run(), plain_output("flux"))
        assert built(session) == 1
    assert torch.equal(rig.run(), plain_output("flux"))


def _fail(*_: object) -> None:
    raise ZeroDivisionError


def test_the_prediction(device: Device) -> None:
    rig = make("flux")
    cost = TECHNIQUE.cost(Target.of(rig), Workload(prompts=("a",), steps=4))
    size = weights(rig)
    assert cost.brought == {"transformer": size}
    assert cost.held == {"transformer": size_of(rig.denoiser) - size}
    with rig.accelerated(TECHNIQUE) as session:
        rig.run()
        assert session.state(TECHNIQUE, modulation_table._Tables).counts.table_bytes == 2 * cost.extra_bytes  # float32


def test_refusals() -> None:
    with pytest.raises(Refused, match="a bare denoiser has none"):
        hasten.accelerate(make("flux").denoiser, TECHNIQUE)
    with pytest.raises(InvalidSetting, match="write it like '8GB'"):
        ModulationTable(pinned="a lot")


def test_an_architecture_that_does_not_say_what_depends_on_time() -> None:
    class Unheard(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(2, 2)

    rig = make("flux")
    rig.components["transformer"] = Unheard()
    with pytest.raises(Refused, match="does not know which linears of Unheard depend on the timestep alone"):
        rig.accelerated(TECHNIQUE)


def test_without_a_step_from_a_table_there_is_no_evidence(device: Device) -> None:
    with make("flux").accelerated(TECHNIQUE) as session, pytest.raises(NotEngaged, match="no step was answered"):
        TECHNIQUE.engaged(session)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    rig = Varied("flux")
    rig.to("cuda")
    plain = rig.run()
    change = added("pooled_projections", 0.5)
    rig.change = change
    changed = rig.run()
    with rig.accelerated(TECHNIQUE) as session:
        for one, expected in ((dict, plain), (change, changed), (dict, plain)):
            rig.change = one
            assert torch.allclose(rig.run(), expected, atol=1e-4, rtol=1e-3)
        assert TECHNIQUE.engaged(session)
        assert {w.tensor.device.type for s in tables(session)[0].slots for w in s.unit.weights} == {"cpu"}
        assert built(session) == 2
    assert torch.equal(rig.run(), plain)
