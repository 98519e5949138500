"""The clock's noise levels and sampler facts, and what techniques put around the scheduler's step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from hasten.core import clock as clock_module
from hasten.core import schedule
from hasten.core import timesteps as timesteps_module
from hasten.core.clock import Moment
from hasten.core.noise import NoiseLevel
from hasten.core.sampler import sampler_facts
from tests.core.stand_ins import Network, Pipeline, clocked, watched

KINDS: tuple[type[Any], ...] = (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)


def levels_of(moments: list[Moment]) -> list[NoiseLevel | None]:
    return [moment.level for moment in moments]


def expected(scheduler: Any, steps: int, begin: int = 0) -> list[NoiseLevel | None]:
    scheduler.set_timesteps(steps)
    facts = sampler_facts(scheduler, begin)
    assert facts is not None
    return [*facts.levels[:-1]]


@pytest.mark.parametrize("kind", KINDS)
def test_each_call_knows_its_noise_level(kind: type[Any]) -> None:
    pipeline = Pipeline(kind())
    with watched(pipeline) as moments:
        pipeline.request(6, calls=2)
        pipeline.request(3)
    three, six = expected(pipeline.scheduler, 3), expected(pipeline.scheduler, 6)
    assert levels_of(moments) == [level for level in six for _ in range(2)] + three


@pytest.mark.parametrize("kind", KINDS[1:])
def test_levels_of_a_request_that_begins_late(kind: type[Any]) -> None:
    pipeline = Pipeline(kind())
    with watched(pipeline) as moments:
        pipeline.request(10, begin=6)
    assert levels_of(moments) == expected(pipeline.scheduler, 10, begin=6)


def rest_of(pipeline: Pipeline, begin: int, shown: Callable[[torch.Tensor], Any]) -> None:
    """The last steps of a schedule, as image-to-image pipelines take them; `shown` is what the denoiser is given."""
    scheduler, sample = pipeline.scheduler, torch.ones(1, 4, 4, 4)
    scheduler.set_timesteps(10)
    for timestep in scheduler.timesteps[begin:]:
        output = pipeline.denoiser(sample, shown(timestep))[0]
        sample = scheduler.step(output, timestep, sample, return_dict=False)[0]


def expanded(timestep: torch.Tensor) -> torch.Tensor:
    return timestep[None].expand(4)


@pytest.mark.parametrize("shown", [lambda t: t, expanded])
def test_a_late_beginning_that_only_the_timestep_tells(shown: Callable[[torch.Tensor], Any]) -> None:
    pipeline = Pipeline(DDIMScheduler())
    with watched(pipeline) as moments:
        rest_of(pipeline, 6, shown)
        rest_of(pipeline, 0, shown)
    early, late = expected(pipeline.scheduler, 10), expected(pipeline.scheduler, 10, begin=6)
    assert levels_of(moments) == late + early
    assert [moment.last for moment in moments] == ([False] * 3 + [True]) + ([False] * 9 + [True])


def test_a_schedulers_own_index_tells_too() -> None:
    pipeline = Pipeline(EulerDiscreteScheduler())
    with watched(pipeline) as moments:
        sample = torch.ones(1, 4, 4, 4)
        pipeline.scheduler.set_timesteps(10)
        for timestep in pipeline.scheduler.timesteps[6:]:
            given = pipeline.scheduler.scale_model_input(sample, timestep)
            output = pipeline.denoiser(given, timestep / 1000)[0]
            sample = pipeline.scheduler.step(output, timestep, sample, return_dict=False)[0]
    assert levels_of(moments) == expected(pipeline.scheduler, 10, begin=6)


def test_a_rescaled_timestep_is_not_mistaken_for_another() -> None:
    """A flow's last timestep of a schedule is 1, which is what its first one becomes when divided by 1000."""
    pipeline = Pipeline(FlowMatchEulerDiscreteScheduler())
    with watched(pipeline) as moments:
        rest_of(pipeline, 0, lambda timestep: timestep / 1000)
    assert levels_of(moments) == expected(pipeline.scheduler, 10)


@pytest.mark.parametrize("shown", [torch.clone, int, torch.Tensor.float])
def test_of_a_copy_only_the_very_first_timestep_tells(shown: Callable[[torch.Tensor], Any]) -> None:
    pipeline = Pipeline(DDIMScheduler())
    with clocked(pipeline) as (clock, _, _), watched(pipeline) as moments:
        rest_of(pipeline, 6, shown)
        assert clock.facts is None
        rest_of(pipeline, 0, shown)
        assert clock.facts is not None
    assert levels_of(moments) == [None] * 4 + expected(pipeline.scheduler, 10)
    assert {(moment.steps, moment.sigma) for moment in moments[:4]} == {(10, None)}


def test_a_solver_that_goes_astray_is_not_claimed() -> None:
    pipeline = Pipeline(PNDMScheduler(skip_prk_steps=True))
    with watched(pipeline) as moments:
        rest_of(pipeline, 6, lambda timestep: timestep)
    assert set(levels_of(moments)) == {None}


def test_facts_are_those_of_the_current_request_and_scheduler() -> None:
    pipeline = Pipeline(DDIMScheduler(clip_sample=False))
    with clocked(pipeline) as (clock, _, _):
        assert clock.facts is None
        for scheduler in (pipeline.scheduler, EulerDiscreteScheduler(), UniPCMultistepScheduler()):
            pipeline.scheduler = scheduler
            for steps in (5, 3):
                pipeline.request(steps)
                assert clock.facts == sampler_facts(scheduler)
                assert clock.facts is not None
                assert clock.facts.steps == steps
        pipeline.request(10, begin=6)
        assert clock.facts.steps == 4
        pipeline.scheduler = EDMEulerScheduler()
        pipeline.request(3)
        assert clock.facts is None


def test_a_bare_denoiser_has_no_levels() -> None:
    network = Network()
    with clocked(network) as (clock, _, _):
        network(torch.ones(1), torch.tensor([500.0]))
        assert (clock.now.level, clock.now.sigma, clock.facts) == (None, None, None)


def test_levels_are_computed_once_a_request(monkeypatch: pytest.MonkeyPatch) -> None:
    counted, compute = list[object](), schedule.sampler_facts

    def count(*args: Any, **kwargs: Any) -> Any:
        counted.append(args)
        return compute(*args, **kwargs)

    monkeypatch.setattr(schedule, "sampler_facts", count)
    pipeline = Pipeline(DDIMScheduler())
    with watched(pipeline):
        for _ in range(3):
            pipeline.request(5, calls=2)
    assert len(counted) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_no_step_waits_for_a_device(kind: type[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With timesteps taken for such of a GPU, hasten reads no value from a tensor but in `set_timesteps`."""
    read = list[str]()

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            caller = sys._getframe(1)
            if caller.f_globals["__name__"].startswith("hasten."):
                read.append(f"{caller.f_globals['__name__']}.{caller.f_code.co_name}")
            return method(*args)

        return run

    for module in (clock_module, timesteps_module):
        monkeypatch.setattr(module, "on_gpu", lambda value: isinstance(value, torch.Tensor))  # pyright: ignore
    pipeline = Pipeline(kind())
    with watched(pipeline) as moments:
        pipeline.scheduler.set_timesteps(5)
        for name in ("item", "tolist", "__float__", "__int__", "__bool__", "__index__"):
            monkeypatch.setattr(torch.Tensor, name, noting(getattr(torch.Tensor, name)))
        sample = torch.ones(1, 4, 4, 4)
        for timestep in pipeline.scheduler.timesteps:
            output = pipeline.call(sample, timestep, 2, ())
            sample = pipeline.scheduler.step(output, timestep, sample, return_dict=False)[0]
    assert read == []
    assert None not in levels_of(moments)
