"""The second-order solver on a sampler's own schedule, against the solver written down plainly."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

from hasten.core.session import accelerate
from hasten.search.solver_runs import SecondOrder
from tests.cache.fields import noise, pipeline_of, sampled

PICTURE = noise(3)


def velocity(timestep: float, sample: torch.Tensor) -> torch.Tensor:
    """Of a denoiser that finds more and more of the picture."""
    time = timestep / 1000
    return (sample - (1 - time**2) * PICTURE * torch.cos(3 * sample * time)) / time


def by_hand(nodes: list[int], times: list[float]) -> torch.Tensor:
    state, before, ends = noise(), None, [times[node] for node in nodes] + [0.0]
    for k, time in enumerate(ends[:-1]):
        clean = state - time * velocity(1000 * time, state)
        guess, there = clean, ends[k + 1]
        if before is not None and there > 0 and ends[k - 1] < 1:
            lam = [math.log((1 - s) / s) for s in (ends[k - 1], time, there)]
            guess = clean + (lam[2] - lam[1]) / (2 * (lam[1] - lam[0])) * (clean - before)
        state, before = there / time * state + (1 - there / time) * guess, clean
    return state


@pytest.mark.parametrize("nodes", [list(range(10)), [0, 1, 3, 4, 7, 9], [0, 5]])
def test_it_is_the_published_method_between_the_nodes(nodes: list[int]) -> None:
    pipeline = pipeline_of(FlowMatchEulerDiscreteScheduler(shift=2.0), velocity)
    pipeline.scheduler.set_timesteps(10)
    times = pipeline.scheduler.sigmas.tolist()
    with accelerate(pipeline, SecondOrder(nodes=tuple(nodes))):
        pipeline.denoiser.calls.clear()
        found = sampled(pipeline, 10)
        assert len(pipeline.denoiser.calls) == len(nodes)
    assert torch.allclose(found, by_hand(nodes, times), atol=1e-4)


def test_it_is_what_diffusers_computes_on_the_same_noise_levels() -> None:
    pipeline = pipeline_of(FlowMatchEulerDiscreteScheduler(shift=2.0), velocity)
    with accelerate(pipeline, SecondOrder(nodes=tuple(range(10)))):
        found = sampled(pipeline, 10)
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0)
    scheduler.set_timesteps(10)
    scheduler.sigmas = pipeline.scheduler.sigmas.clone()
    scheduler.timesteps = pipeline.scheduler.timesteps.clone()
    sample = noise()
    for timestep in scheduler.timesteps:
        sample = scheduler.step(velocity(float(timestep), sample), timestep, sample, return_dict=False)[0]
    assert torch.allclose(found, sample, atol=1e-3)
