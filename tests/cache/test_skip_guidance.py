"""SkipGuidance: the unconditional half is the conditional one less a kept difference, and nothing else is touched."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from hasten.cache.engine.guidance import GuidanceSchedule
from hasten.cache.first_block import FirstBlockCache
from hasten.cache.skip_guidance import SkipGuidance
from hasten.core.errors import InvalidSetting, NotEngaged, Refused
from hasten.core.registry import specs
from hasten.core.session import accelerate
from hasten.core.spec import InputSize
from hasten.core.target import Target
from hasten.core.workload import Workload
from tests.contract.rigs import Rig, make, plain_output

BATCHED = [name for name, spec in specs().items() if spec.guidance == "batched"]
SEPARATE = [name for name, spec in specs().items() if spec.guidance == "separate"]
Arguments = dict[str, Any]


def tensor(value: Any) -> torch.Tensor:
    return torch.stack(value) if isinstance(value, list) else value


def pair(rig: Rig, seed: int, pairs: int = 1) -> Arguments:
    """Arguments of a guided batch: the same pictures in both halves."""
    size = InputSize(batch=2 * pairs)
    given = rig.spec.example(rig.denoiser.config, size, seed)  # pyright: ignore[reportArgumentType]
    picture = given[rig.spec.latents]
    return given | {
        rig.spec.latents: [*picture[:pairs]] * 2
        if isinstance(picture, list)
        else picture[:pairs].repeat(2, *(1,) * (picture.dim() - 1))
    }


def moved(rig: Rig, given: Arguments, step: int) -> Arguments:
    """The same call with a picture that has moved on a little, equally in both halves."""
    picture = given[rig.spec.latents]
    other = [p * (1 - 0.02 * step) for p in picture] if isinstance(picture, list) else picture * (1 - 0.02 * step)
    return given | {rig.spec.latents: other}


@torch.no_grad()
def request(rig: Rig, steps: Sequence[Sequence[tuple[str, Arguments]]]) -> list[torch.Tensor]:
    """One request; each step makes the given calls in their contexts."""
    model: Any = rig.denoiser
    rig.scheduler.set_timesteps(len(steps))
    outputs: list[torch.Tensor] = []
    for calls, timestep in zip(steps, rig.scheduler.timesteps, strict=True):
        for context, given in calls:
            with model.cache_context(context) if context else nullcontext():
                outputs.append(tensor(rig.call(given)))
        rig.scheduler.step(torch.zeros(1), timestep, torch.zeros(1))
    return outputs


def batched(rig: Rig, steps: int, seed: int = 0, pairs: int = 1) -> list[list[tuple[str, Arguments]]]:
    given = pair(rig, seed, pairs)
    return [[("", moved(rig, given, step))] for step in range(steps)]


@contextmanager
def batches_of(rig: Rig) -> Generator[list[int]]:
    """The batch size of every call that reaches the network."""
    sizes: list[int] = []

    def note(_: Any, args: Any, kwargs: Any) -> None:
        sizes.append(len(kwargs[rig.spec.latents]))

    handle = rig.denoiser.register_forward_pre_hook(note, with_kwargs=True)
    yield sizes
    handle.remove()


def halves(rig: Rig, output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Conditional and unconditional half."""
    first, last = output.chunk(2)
    return (first, last) if rig.spec.conditional == "first" else (last, first)


# Batched guidance


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("architecture", BATCHED)
def test_half_of_the_batch_runs_and_the_other_half_is_derived(architecture: str, pairs: int) -> None:
    rig = make(architecture)
    calls = batched(rig, 6, pairs=pairs)
    plain = request(rig, calls)
    with rig.accelerated(SkipGuidance()) as session, batches_of(rig) as sizes:
        outputs = request(rig, calls)
        (evidence,) = session.evidence().values()
    assert sizes == [2 * pairs, 2 * pairs, 2 * pairs, pairs, 2 * pairs, pairs]
    assert all(torch.equal(outputs[step], plain[step]) for step in (0, 1, 2, 4))
    for step in (3, 5):
        conditional, unconditional = halves(rig, plain[step])
        before = halves(rig, plain[step - 1])
        mine = halves(rig, outputs[step])
        torch.testing.assert_close(mine[0], conditional, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(mine[1], mine[0] - (before[0] - before[1]), atol=1e-6, rtol=1e-6)
        assert not torch.allclose(mine[1], unconditional, atol=1e-6)
    assert (evidence.full_steps, evidence.reused_steps) == (10, 2)
    assert {name.split()[-1]: steps for name, steps in evidence.step_map.items()} == {
        "cond": (True,) * 6,
        "uncond": (True, True, True, False, True, False),
    }


@pytest.mark.parametrize("architecture", BATCHED)
def test_with_the_same_input_a_half_step_equals_the_whole_one(architecture: str) -> None:
    rig = make(architecture)
    given = pair(rig, 0)
    with rig.accelerated(SkipGuidance(interval=5)):
        outputs = request(rig, [[("", given)]] * 5)
    for output in outputs[2:]:
        torch.testing.assert_close(output, outputs[0], atol=1e-5, rtol=1e-5)


def test_a_linear_difference_is_forecast_by_the_first_order() -> None:
    rig = make("dit")
    calls = batched(rig, 6)
    plain = request(rig, calls)
    with rig.accelerated(SkipGuidance(order=1, interval=2)):
        outputs = request(rig, calls)
    differences = [one - other for one, other in (halves(rig, output) for output in plain)]
    mine = halves(rig, outputs[5])
    expected = differences[4] + (differences[4] - differences[2]) / 2
    torch.testing.assert_close(mine[0] - mine[1], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["dit", "stable_diffusion", "z_image"])
def test_pictures_that_only_look_guided_are_computed(architecture: str) -> None:
    """Two prompts with one seed begin with equal pictures, which part at the next step."""
    rig = make(architecture)
    calls = batched(rig, 6)
    for step, ((_, given),) in enumerate(calls):
        picture = given[rig.spec.latents]
        parted = (
            [picture[0], picture[1] + 0.1 * step]
            if isinstance(picture, list)
            else torch.stack([picture[0], picture[1] + 0.1 * step])
        )
        given[rig.spec.latents] = parted
    plain = request(rig, calls)
    with rig.accelerated(SkipGuidance()) as session:
        outputs = request(rig, calls)
        assert all(torch.equal(one, other) for one, other in zip(outputs, plain, strict=True))
        with pytest.raises(NotEngaged, match="the batch is not guided"):
            session.evidence()


def test_a_single_picture_is_computed_and_evidence_says_why() -> None:
    rig = make("dit")
    given = rig.spec.example(rig.denoiser.config, InputSize(batch=1))  # pyright: ignore[reportArgumentType]
    with rig.accelerated(SkipGuidance()) as session:
        request(rig, [[("", given)]] * 4)
        with pytest.raises(NotEngaged, match="the batch has no two halves"):
            session.evidence()


def test_a_change_of_the_batch_begins_anew() -> None:
    rig = make("stable_diffusion")
    small, large = batched(rig, 4), batched(rig, 4, seed=1, pairs=2)
    calls = [*small, *large, *small]
    plain = request(rig, calls)
    with rig.accelerated(SkipGuidance(interval=12)) as session, batches_of(rig) as sizes:
        outputs = request(rig, calls)
        (evidence,) = session.evidence().values()
    assert sizes == [2, 2, 1, 1, 4, 4, 2, 2, 2, 2, 1, 1]
    assert all(torch.equal(outputs[step], plain[step]) for step in (0, 1, 4, 5, 8, 9))
    assert "size, settings or adapters changed: 2" in evidence.summary


def test_a_failure_leaves_nothing_to_reuse() -> None:
    rig = make("dit")
    calls = batched(rig, 8)

    def fail(*_: object) -> None:
        raise InterruptedError

    with rig.accelerated(SkipGuidance(interval=99)), torch.no_grad(), batches_of(rig) as sizes:
        rig.scheduler.set_timesteps(8)
        sample = torch.zeros(1)
        for step, ((_, given),) in enumerate(calls):
            handle = rig.denoiser.register_forward_pre_hook(fail) if step == 4 else None
            with pytest.raises(InterruptedError) if handle else nullcontext():
                rig.call(given)
            if handle:
                handle.remove()
            sample = rig.scheduler.step(sample, rig.scheduler.timesteps[step], sample)[0]
    assert sizes == [2, 2, 1, 1, 1, 2, 2, 1]


def test_nested_arguments_and_controlnets_are_halved() -> None:
    """SDXL's size conditioning comes in a dictionary, a ControlNet's residuals in a tuple."""
    rig = make("sdxl")
    given = pair(rig, 0)
    model: Any = rig.denoiser
    shapes: list[torch.Size] = []
    hooks = [model.conv_in.register_forward_hook(lambda *call: shapes.append(call[2].shape))]
    hooks += [d.register_forward_hook(lambda *c: shapes.extend(o.shape for o in c[2][1])) for d in model.down_blocks]
    rig.call(given)
    for handle in hooks:
        handle.remove()
    made = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in (*shapes, shapes[-1])]
    given |= {"down_block_additional_residuals": tuple(made[:-1]), "mid_block_additional_residual": made[-1]}
    with rig.accelerated(SkipGuidance(interval=4)), batches_of(rig) as sizes:
        outputs = request(rig, [[("", given)]] * 4)
    assert sizes == [2, 2, 1, 1]
    torch.testing.assert_close(outputs[3], outputs[0], atol=1e-5, rtol=1e-5)


# Separate calls


def two_calls(
    rig: Rig, steps: int, contexts: tuple[str, str] = ("cond", "uncond")
) -> list[list[tuple[str, Arguments]]]:
    prompt, negative = (rig.spec.example(rig.denoiser.config, None, seed) for seed in (0, 1))  # pyright: ignore
    negative[rig.spec.latents] = prompt[rig.spec.latents]
    made: list[list[tuple[str, Arguments]]] = []
    for step in range(steps):
        now = moved(rig, prompt, step)
        made.append([(contexts[0], now), (contexts[1], negative | {rig.spec.latents: now[rig.spec.latents]})])
    return made


@pytest.mark.parametrize("contexts", [("cond", "uncond"), ("", "")])
@pytest.mark.parametrize("architecture", SEPARATE)
def test_the_unconditional_call_is_left_out(architecture: str, contexts: tuple[str, str]) -> None:
    rig = make(architecture)
    calls = two_calls(rig, 5, contexts)
    plain = request(rig, calls)
    with rig.accelerated(SkipGuidance()) as session, batches_of(rig) as ran:
        outputs = request(rig, calls)
        (evidence,) = session.evidence().values()
    assert len(ran) == 8
    assert all(torch.equal(outputs[i], plain[i]) for i in (0, 1, 2, 4, 5, 6, 8, 9))
    for step in (1, 3):
        expected = plain[2 * step] - (plain[2 * step - 2] - plain[2 * step - 1])
        torch.testing.assert_close(outputs[2 * step + 1], expected, atol=1e-6, rtol=1e-6)
    assert (evidence.full_steps, evidence.reused_steps) == (8, 2)
    assert sorted(map(sum, evidence.step_map.values())) == [3, 5]


def test_an_unconditional_call_without_its_conditional_one_is_computed() -> None:
    rig = make("wan")
    calls = two_calls(rig, 4)
    other = rig.spec.example(rig.denoiser.config, None, 7)  # pyright: ignore[reportArgumentType]
    cases = {
        "first": [step[::-1] for step in calls],
        "alone": [step[1:] for step in calls],
        "of another picture": [[step[0], ("uncond", other)] for step in calls],
    }
    for name, case in cases.items():
        plain = request(rig, case)
        with rig.accelerated(SkipGuidance()) as session:
            outputs = request(rig, case)
            with pytest.raises(NotEngaged, match="no conditional call on the same picture"):
                session.evidence()
        assert all(torch.equal(one, two) for one, two in zip(outputs, plain, strict=True)), name


def test_without_guidance_the_evidence_says_so() -> None:
    rig = make("qwen_image")
    with rig.accelerated(SkipGuidance()) as session:
        request(rig, [step[:1] for step in two_calls(rig, 4)])
        with pytest.raises(NotEngaged, match="is the pipeline's guidance off"):
            session.evidence()


def test_no_request_uses_the_difference_of_another() -> None:
    rig = make("wan")
    calls = two_calls(rig, 3)
    with rig.accelerated(SkipGuidance(interval=3)), batches_of(rig) as ran:
        for _ in range(2):
            request(rig, calls)
    assert len(ran) == 2 * 4


# Guidance intervals


def test_the_schedule() -> None:
    schedule = GuidanceSchedule(2, 0.25, 0.75)
    assert [schedule.at(step, 8) for step in range(8)] == ["off"] * 2 + ["compute", "reuse"] * 2 + ["off"] * 2
    assert schedule.computed(8) == 2
    assert schedule.at(0, None) == "compute"
    assert [GuidanceSchedule(1).at(step, 5) for step in range(5)] == ["compute"] * 5
    assert GuidanceSchedule(1, 1.0, 1.0).computed(5) == 0


@pytest.mark.parametrize("architecture", SEPARATE)
def test_outside_the_interval_both_outputs_are_the_conditional_one(architecture: str) -> None:
    rig = make(architecture)
    calls = two_calls(rig, 8)
    plain = request(rig, calls)
    with rig.accelerated(SkipGuidance(interval=1, start=0.25, stop=0.75)), batches_of(rig) as ran:
        outputs = request(rig, calls)
    assert len(ran) == 8 + 4
    for step in range(8):
        guided = 2 <= step < 6
        assert torch.equal(outputs[2 * step + 1], plain[2 * step + 1] if guided else outputs[2 * step])


@pytest.mark.parametrize("architecture", ["dit", "stable_diffusion", "z_image"])
def test_in_a_batch_too_once_it_is_certain(architecture: str) -> None:
    rig = make(architecture)
    calls = batched(rig, 8)
    with rig.accelerated(SkipGuidance(interval=1, start=0.5, stop=0.75)), batches_of(rig) as sizes:
        outputs = request(rig, calls)
    assert sizes == [2, 2, 1, 1, 2, 2, 1, 1]
    for step in (2, 3, 6, 7):
        assert torch.equal(*halves(rig, outputs[step]))


# Settings, refusals, cost


@pytest.mark.parametrize("architecture", [*BATCHED, *SEPARATE])
def test_interval_one_is_the_plain_model(architecture: str) -> None:
    rig = make(architecture)
    with rig.accelerated(SkipGuidance(interval=1)) as session:
        assert torch.equal(rig.run(), plain_output(architecture))
        (evidence,) = session.evidence().values()
    assert evidence.reused_steps == 0
    assert "held" not in evidence.summary


def test_refusals_name_the_way_out() -> None:
    with pytest.raises(Refused, match="guidance built in.*use FirstBlockCache"):
        accelerate(make("flux"), SkipGuidance())
    with pytest.raises(Refused, match="keep one of them"):
        make("dit").accelerated(SkipGuidance(), FirstBlockCache())
    with pytest.raises(InvalidSetting, match="must not be below"):
        SkipGuidance(start=0.5, stop=0.4)


@pytest.mark.parametrize(("architecture", "floats"), [("dit", 3 * 8 * 16 * 16), ("qwen_image", 4 * 64 * 16)])
def test_the_cost_is_half_a_step(architecture: str, floats: int) -> None:
    target, workload = Target.of(make(architecture)), Workload(steps=10, width=128, height=128)
    assert SkipGuidance(interval=1).cost(target, workload).time_factor == 1
    cost = SkipGuidance(interval=2, order=1).cost(target, workload)
    assert cost.time_factor == pytest.approx(0.75)
    assert cost.extra_bytes == 4 * floats
    assert SkipGuidance(interval=1, stop=0.5).cost(target, workload).time_factor == pytest.approx(0.75)
