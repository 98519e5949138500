"""MagCache against diffusers' own, and the schedule that is made before the first step."""

from __future__ import annotations

import pytest
import torch
from cache_harness import Arguments, Pipe, executed, repeat, sample
from diffusers.hooks.mag_cache import FLUX_MAG_RATIOS, MagCacheConfig, nearest_interp
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.cache.mag_cache import MagCache, mag_schedule
from hasten.core.clock import Moment
from hasten.core.errors import InvalidSetting, NotEngaged, Refused
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.workload import Workload
from tests.contract.rigs import make

FLUX = tuple(FLUX_MAG_RATIOS.tolist())


def drifting(pipe: Pipe, steps: int) -> list[Arguments]:
    start, end = pipe.arguments(0), pipe.arguments(1)[pipe.input]
    return [start | {pipe.input: start[pipe.input] + 0.05 * step * end} for step in range(steps)]


@pytest.mark.parametrize("steps", [28, 20, 50])
@pytest.mark.parametrize("limits", [(0.06, 3, 0.2), (0.24, 5, 0.1), (0.12, 2, 0.0)])
def test_it_is_what_diffusers_does(steps: int, limits: tuple[float, int, float]) -> None:
    ours, theirs = Pipe("flux"), Pipe("flux")
    threshold, most, retention = limits
    config = MagCacheConfig(
        threshold=threshold,
        max_skip_steps=most,
        retention_ratio=retention,
        num_inference_steps=steps,
        mag_ratios=FLUX_MAG_RATIOS,
    )
    theirs.model.enable_cache(config)
    technique = MagCache(threshold=threshold, max_consecutive=most, retention=retention, ratios=FLUX)
    with torch.no_grad(), theirs.model.cache_context("one"):
        expected = repeat(theirs, steps, *drifting(theirs, steps))
    with torch.no_grad(), accelerate(ours, technique) as session:
        outputs = repeat(ours, steps, *drifting(ours, steps))
        assert 0 < (session.evidence()[technique].reused_steps or 0) < steps
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(outputs, expected, strict=True))


@settings(deadline=None, max_examples=100)
@given(
    ratios=st.lists(st.floats(0.5, 1.5), min_size=1, max_size=40),
    steps=st.integers(1, 60),
    threshold=st.floats(0, 1),
    most=st.integers(0, 6),
    retention=st.floats(0, 1),
)
def test_a_schedule_keeps_its_limits(
    ratios: list[float], steps: int, threshold: float, most: int, retention: float
) -> None:
    schedule = mag_schedule(ratios, steps, threshold, most, retention)
    scaled = nearest_interp(torch.tensor(ratios, dtype=torch.float64), steps).tolist()
    assert len(schedule) == steps
    assert all(schedule[: max(1, int(retention * steps + 0.5))])
    product, error, run = 1.0, 0.0, 0
    for computes, ratio in zip(schedule, scaled, strict=True):
        product, run = product * ratio, run + 1
        error += abs(1 - product)
        assert computes or (error <= threshold and run <= most)
        if computes:
            product, error, run = 1.0, 0.0, 0


def test_the_published_rule_for_flux_never_leaves_out_step_11() -> None:
    wild = MagCache(ratios="FLUX.1-dev", threshold=1e9, max_consecutive=100, retention=0.0)
    policy = wild.policy(Target.planned("FLUX.1-dev").denoisers[0])
    for steps, computed in ((28, {0, 11}), (55, {0, 22}), (14, {0})):
        assert {step for step in range(steps) if policy.decide(Moment(0, step, "", steps))} == computed


def test_the_schedule_is_the_same_for_every_prompt_and_known_beforehand() -> None:
    pipe, technique = Pipe("flux"), MagCache(ratios=FLUX)
    with torch.no_grad(), accelerate(pipe, technique) as session:
        maps: list[tuple[bool, ...]] = []
        for seed in (0, 1):
            sample(pipe, 28, pipe.arguments(seed), pipe.arguments(seed + 2))
            maps += session.evidence()[technique].step_map.values()
    assert len(maps) == 4
    assert set(maps) == {mag_schedule(FLUX, 28, 0.06, 3, 0.2)}
    assert not technique.syncs


def test_the_cost_follows_from_the_schedule() -> None:
    technique = MagCache(ratios=FLUX)
    cost = technique.cost(Target.of(make("flux")), Workload(steps=28, width=128, height=128))
    share = sum(mag_schedule(FLUX, 28, 0.06, 3, 0.2)) / 28
    assert cost.time_factor is not None
    assert share < cost.time_factor < share + 0.2
    assert cost.extra_bytes > 0


def test_without_a_scheduler_everything_is_computed_and_the_reason_is_said() -> None:
    pipe, technique = Pipe("flux"), MagCache(ratios=FLUX)
    with torch.no_grad(), accelerate(pipe.model, technique) as session:
        for step in range(6):
            pipe.model(**pipe.arguments() | {"timestep": torch.full((1,), 1 - step / 10)})
        with pytest.raises(NotEngaged, match="the number of steps is unknown without a scheduler"):
            session.evidence()


def test_on_a_unet_the_deep_feature_is_reused() -> None:
    pipe, technique = Pipe("stable_diffusion"), MagCache(ratios=(1.0,) * 10, max_consecutive=1)
    with torch.no_grad(), accelerate(pipe, technique), executed(pipe.model, type(pipe.model.mid_block)) as ran:
        sample(pipe, 10, pipe.arguments())
    assert len(ran) == 6  # 0 and 1 by retention, then every other one


@pytest.mark.parametrize(
    ("architecture", "ratios", "sentence"),
    [
        ("flux", "auto", "There are no magnitude ratios for this FluxTransformer2DModel; measure them with"),
        ("stable_diffusion", "FLUX.1-dev", "were measured on the residual; here the deep feature is reused."),
        ("flux", "emoji-sd", "were measured on the deep feature; here the residual is reused."),
    ],
)
def test_ratios_that_do_not_fit_are_refused(architecture: str, ratios: str, sentence: str) -> None:
    with pytest.raises(Refused) as caught:
        accelerate(make(architecture), MagCache(ratios=ratios))
    assert sentence in str(caught.value)


def test_absurd_ratios_are_an_error() -> None:
    for ratios in ((), "", (1.0, -1.0), (1.0, float("nan"))):
        with pytest.raises(InvalidSetting, match="one number of at least 0"):
            MagCache(ratios=ratios)
