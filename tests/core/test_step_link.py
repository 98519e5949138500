"""What techniques put around the scheduler's step: order, arguments, other schedulers, and off again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from hasten.core.clock import Clock
from hasten.core.errors import PatchError
from hasten.core.patch import Patch
from tests.core.stand_ins import Network, Pipeline, clocked, watched


class Notes:
    """Links around the step that write down what they see."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.seen = clock, list[tuple[str, int]]()

    def link(self, name: str) -> Callable[..., Any]:
        def run(call: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen.append((name, self.clock.now.step))
            return call(model_output, timestep, sample, *args, **kwargs)

        return run


def test_links_run_around_each_step_the_later_one_outside() -> None:
    pipeline = Pipeline(EulerDiscreteScheduler())
    with clocked(pipeline) as (clock, _, patch), watched(pipeline) as moments:
        notes = Notes(clock)
        clock.around_step(notes.link("first"), patch)
        clock.around_step(notes.link("second"), patch)
        pipeline.request(3, calls=2)
    assert notes.seen == [(name, step) for step in range(3) for name in ("second", "first")]
    assert [moment.step for moment in moments] == [0, 0, 1, 1, 2, 2]


def test_a_link_changes_what_the_scheduler_is_given() -> None:
    def halved(call: Any, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        return call(model_output / 2, timestep, sample, *args, **kwargs)

    pipeline = Pipeline(FlowMatchEulerDiscreteScheduler())
    with clocked(pipeline) as (clock, _, patch):
        clock.around_step(halved, patch, "halves the output")
        pipeline.scheduler.set_timesteps(2)
        arguments = {"model_output": torch.ones(1), "timestep": pipeline.scheduler.timesteps[0]}
        changed = pipeline.scheduler.step(**arguments, sample=torch.zeros(1), return_dict=False)[0]
        assert [(change.where, change.what) for change in patch.log] == [("scheduler", "halves the output")]
        patch.close()
        pipeline.scheduler.set_timesteps(2)
        plain = pipeline.scheduler.step(**arguments, sample=torch.zeros(1), return_dict=False)[0]
    assert changed.item() == plain.item() / 2 != 0


def test_links_follow_the_pipeline_to_another_scheduler_and_come_off_all() -> None:
    first, second, third = EulerDiscreteScheduler(), DDIMScheduler(), UniPCMultistepScheduler()
    pipeline = Pipeline(first)
    with clocked(pipeline) as (clock, own, patch):
        other, notes = Patch({}, lambda: clock), Notes(clock)
        clock.around_step(notes.link("a"), patch)
        clock.around_step(notes.link("b"), other)
        for scheduler in (second, first):
            pipeline.scheduler = scheduler
            notes.seen.clear()
            pipeline.request(2)
            assert notes.seen == [("b", 0), ("a", 0), ("b", 1), ("a", 1)]
        other.close()
        pipeline.scheduler = third
        notes.seen.clear()
        pipeline.request(2)
        assert notes.seen == [("a", 0), ("a", 1)]
        patch.close()
        pipeline.request(2)
        assert len(notes.seen) == 2
        own.close()
    for scheduler, kind in ((first, EulerDiscreteScheduler), (second, DDIMScheduler), (third, UniPCMultistepScheduler)):
        assert type(scheduler) is kind


def test_a_former_scheduler_is_left_alone() -> None:
    pipeline, former = Pipeline(DDIMScheduler()), DDIMScheduler()
    current, pipeline.scheduler = pipeline.scheduler, former
    with clocked(pipeline) as (clock, _, patch):
        notes = Notes(clock)
        clock.around_step(notes.link("a"), patch)
        pipeline.scheduler = current
        pipeline.request(1)
        former.set_timesteps(3)
        former.step(torch.ones(1), int(former.timesteps[0]), torch.ones(1))
    assert len(notes.seen) == 1


def test_a_failing_link_does_not_count_as_a_step() -> None:
    def fail(*_: object) -> None:
        raise ValueError("here")

    pipeline = Pipeline(EulerDiscreteScheduler())
    with clocked(pipeline) as (clock, _, patch):
        pipeline.scheduler.set_timesteps(3)
        pipeline.denoiser(torch.ones(1), pipeline.scheduler.timesteps[0])
        clock.around_step(lambda *args, **kwargs: fail(), patch)
        with pytest.raises(ValueError, match="here"):
            pipeline.scheduler.step(torch.ones(1), pipeline.scheduler.timesteps[0], torch.ones(1))
        pipeline.denoiser(torch.ones(1), pipeline.scheduler.timesteps[0])
        assert clock.now.step == 0
        with pytest.raises(TypeError):
            pipeline.scheduler.step(torch.ones(1))


def test_without_a_scheduler_there_is_nothing_to_stand_around() -> None:
    with clocked(Network()) as (clock, _, patch), pytest.raises(PatchError, match="no scheduler"):
        clock.around_step(lambda call, *args: call(*args), patch)
