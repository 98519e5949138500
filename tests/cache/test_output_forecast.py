"""Forecasts of whole outputs: exact where they must be, and honest about samplers they do not suit."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_ancestral_discrete import EulerAncestralDiscreteScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_heun_discrete import HeunDiscreteScheduler

from hasten.cache.engine.course import BEND, graded
from hasten.cache.output_forecast import OutputForecast
from hasten.core.errors import InvalidSetting, NotEngaged, Refused
from hasten.core.session import accelerate
from tests.cache.fields import Field, noise, pipeline_of, sampled
from tests.core.stand_ins import Pipeline

FULL: dict[str, Any] = {"trust": 1.0}


def errors(
    pipeline: Pipeline, technique: OutputForecast, steps: int = 12, start: torch.Tensor | None = None
) -> tuple[float, int, str]:
    """Largest difference from the plain result, the number of network calls, and the evidence."""
    plain = sampled(pipeline, steps, start)
    field: Any = pipeline.denoiser
    with accelerate(pipeline, technique) as session:
        field.calls.clear()
        result = sampled(pipeline, steps, start)
        calls = len(field.calls)
        summary = session.evidence()[technique].summary
    return float((result - plain).abs().max()), calls, summary


def linear_in_flow_time(timestep: float, sample: torch.Tensor) -> torch.Tensor:
    return noise(1) + 3 * timestep / 1000 * noise(2)


def test_a_velocity_that_is_linear_in_flow_time_is_forecast_exactly() -> None:
    pipeline = pipeline_of(FlowMatchEulerDiscreteScheduler(shift=3.0), linear_in_flow_time)
    exact, calls, summary = errors(pipeline, OutputForecast(interval=3, variable="flow_time", **FULL))
    hold, _, _ = errors(pipeline, OutputForecast(interval=3, order=0, correct=False))
    assert calls == 4
    assert exact < 1e-5
    assert hold > 0.05
    assert "integrated again" in summary


def test_correction_repairs_the_first_segment_which_can_only_be_held() -> None:
    pipeline = pipeline_of(FlowMatchEulerDiscreteScheduler(), linear_in_flow_time)
    settings: dict[str, Any] = {"interval": 3, "variable": "flow_time", **FULL}
    exact, _, _ = errors(pipeline, OutputForecast(**settings))
    plain, _, _ = errors(pipeline, OutputForecast(**settings, correct=False))
    assert exact < 1e-5 < 1e-3 < plain


def test_where_forecasts_are_exact_correcting_changes_nothing() -> None:
    pipeline = pipeline_of(FlowMatchEulerDiscreteScheduler(), lambda timestep, sample: noise(1))
    for correct in (True, False):
        error, calls, _ = errors(pipeline, OutputForecast(full_steps=2, correct=correct))
        assert error < 1e-5
        assert calls == 2


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
def test_every_prediction_is_forecast_as_a_velocity(scheduler: Any, prediction: str) -> None:
    """Picture and noise fixed, so is the velocity; but v changes from step to step, and so does epsilon's meaning."""
    picture, grain = noise(3), noise(4)
    steps: dict[str, Any] = {"prediction_type": prediction, "timestep_spacing": "trailing", "steps_offset": 1}
    made = scheduler(**steps, **({"clip_sample": False} if scheduler is DDIMScheduler else {}))

    def predict(timestep: float, sample: torch.Tensor) -> torch.Tensor:
        signal = made.alphas_cumprod[int(timestep)].sqrt()
        sigma = (1 - signal**2).sqrt()
        return {"epsilon": grain, "sample": picture, "v_prediction": signal * grain - sigma * picture}[prediction]

    made.set_timesteps(20)
    signal = float(made.alphas_cumprod[int(made.timesteps[0])].sqrt())
    grainy = math.sqrt(1 - signal**2)
    ratio = grainy / signal
    start = signal * picture + grainy * grain if scheduler is DDIMScheduler else picture + ratio * grain
    pipeline = pipeline_of(made, predict)
    velocity, calls, _ = errors(pipeline, OutputForecast(full_steps=4, order=0, correct=False), 20, start)
    held, _, _ = errors(pipeline, OutputForecast(full_steps=4, order=0, correct=False, quantity="output"), 20, start)
    assert calls == 4
    assert velocity < 2e-3
    assert prediction != "v_prediction" or held > 0.1


def test_denoisers_whose_pipeline_changes_the_sign_are_forecast_as_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    from hasten.core import spec

    picture = noise(3)
    pipeline = pipeline_of(FlowMatchEulerDiscreteScheduler(), lambda t, sample: picture)

    def negative(timestep: float, sample: torch.Tensor) -> torch.Tensor:
        return -(sample - picture) / (timestep / 1000)

    field: Any = pipeline.denoiser
    field.predict = negative
    made = spec.unknown_spec(field)
    monkeypatch.setattr("hasten.core.target.unknown_spec", lambda module: _with_sign(made))
    scheduler = pipeline.scheduler
    step = type(scheduler).step
    monkeypatch.setattr(type(scheduler), "step", lambda self, out, *a, **k: step(self, -out, *a, **k))
    monkeypatch.setattr("hasten.core.schedulers._METHODS", ())
    error, calls, _ = errors(pipeline, OutputForecast(full_steps=3, order=0, quantity="clean", correct=False))
    assert calls == 3
    assert error < 1e-4


def _with_sign(made: Any) -> Any:
    import dataclasses

    return dataclasses.replace(made, sign=-1)


def test_samplers_with_a_memory_get_the_plain_forecast_and_the_evidence_says_so() -> None:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0)
    pipeline = pipeline_of(scheduler, linear_in_flow_time)
    _, calls, summary = errors(pipeline, OutputForecast(interval=2))
    assert calls == 6
    assert "integrated again" not in summary
    assert "cannot be corrected" in summary


def test_samplers_that_add_noise_are_refused() -> None:
    pipeline = pipeline_of(EulerAncestralDiscreteScheduler(), lambda timestep, sample: noise(1))
    with pytest.raises(Refused, match="adds noise at each step"):
        accelerate(pipeline, OutputForecast())


def test_noise_that_only_the_call_asks_for_makes_every_later_step_compute() -> None:
    pipeline = pipeline_of(DDIMScheduler(), lambda timestep, sample: noise(1))
    field: Any = pipeline.denoiser
    with accelerate(pipeline, OutputForecast(full_steps=4)) as session:
        sampled(pipeline, 12, eta=1.0)
        assert len(field.calls) >= 11
        with pytest.raises(NotEngaged, match="adds noise"):
            session.evidence()


def test_samplers_that_call_twice_a_step_are_computed() -> None:
    pipeline = pipeline_of(HeunDiscreteScheduler(), lambda timestep, sample: noise(1))
    field: Any = pipeline.denoiser
    with accelerate(pipeline, OutputForecast(full_steps=4)) as session:
        sampled(pipeline, 8)
        assert len(field.calls) == 15
        with pytest.raises(NotEngaged, match="several calls per step"):
            session.evidence()


def test_a_sampler_that_is_not_known_is_computed() -> None:
    class Own(FlowMatchEulerDiscreteScheduler):
        def step(self, *args: Any, **kwargs: Any) -> Any:
            return super().step(*args, **kwargs)

    pipeline = pipeline_of(Own(), lambda timestep, sample: noise(1))
    field: Any = pipeline.denoiser
    with accelerate(pipeline, OutputForecast(full_steps=4)) as session:
        sampled(pipeline, 8)
        assert len(field.calls) == 8
        with pytest.raises(NotEngaged, match="not known"):
            session.evidence()


def waves(speed: float) -> Pipeline:
    def predict(timestep: float, sample: torch.Tensor) -> torch.Tensor:
        return 1.5 * noise(1) + math.sin(speed * timestep / 1000) * noise(2)

    return pipeline_of(FlowMatchEulerDiscreteScheduler(), predict)


def test_the_controller_spends_more_steps_on_harder_pictures() -> None:
    technique = OutputForecast(tolerance=0.005)
    easy, calm, _ = errors(waves(2.0), technique, 28)
    hard, busy, _ = errors(waves(12.0), technique, 28)
    assert calm < 14 < busy < 28
    assert easy < 0.05
    assert hard < 0.1


def test_a_tighter_tolerance_is_nearer_to_the_plain_result() -> None:
    loose, few, _ = errors(waves(6.0), OutputForecast(tolerance=0.05), 28)
    tight, many, _ = errors(waves(6.0), OutputForecast(tolerance=0.001), 28)
    assert few < many
    assert tight < loose


def test_one_sample_of_a_batch_is_enough_to_demand_steps() -> None:
    def predict(timestep: float, sample: torch.Tensor) -> torch.Tensor:
        wave = math.sin(12 * timestep / 1000) * noise(2)
        return 1.5 * noise(1) + torch.stack([0 * wave[0], wave[1]])

    _, calls, _ = errors(pipeline_of(FlowMatchEulerDiscreteScheduler(), predict), OutputForecast(tolerance=0.005), 28)
    assert calls > 14


def test_half_precision_outputs_keep_their_type() -> None:
    pipeline = pipeline_of(FlowMatchEulerDiscreteScheduler(), lambda timestep, sample: noise(1).bfloat16())
    kinds: set[torch.dtype] = set()
    with accelerate(pipeline, OutputForecast(full_steps=2)):
        pipeline.scheduler.set_timesteps(6)
        for timestep in pipeline.scheduler.timesteps:
            output = pipeline.denoiser(noise(), timestep)[0]
            kinds.add(output.dtype)
            pipeline.scheduler.step(output, timestep, noise().bfloat16())
    assert kinds == {torch.bfloat16}


def test_interval_one_touches_nothing() -> None:
    error, calls, _ = errors(waves(6.0), OutputForecast(interval=1), 9)
    assert error == 0
    assert calls == 9


def test_settings_that_lead_astray_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="not both"):
        OutputForecast(tolerance=0.1, full_steps=3)
    with pytest.raises(InvalidSetting, match="at most 2"):
        OutputForecast(order=3)
    with pytest.raises(Refused, match="order=1"):
        accelerate(waves(1.0), OutputForecast(order=2, interval=3))
    assert OutputForecast(order=2, full_steps=10).rule(28).order == 1
    assert OutputForecast(order=2, full_steps=14).rule(28).order == 2


@pytest.mark.parametrize(("steps", "full"), [(28, 14), (28, 5), (50, 25), (4, 2), (4, 1), (3, 9), (1, 1)])
def test_schedules_have_the_number_of_steps_and_reach_from_first_to_last(steps: int, full: int) -> None:
    for bend in (1.0, BEND, 3.0):
        schedule = graded(steps, full, bend)
        assert len(schedule) == min(full, steps) == len(set(schedule))
        assert schedule[0] == 0
        assert schedule == tuple(sorted(schedule))
        assert schedule[-1] == (steps - 1 if full > 1 else 0)


def test_a_field_counts_its_calls() -> None:
    assert isinstance(waves(1.0).denoiser, Field)
