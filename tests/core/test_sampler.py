"""What is claimed about schedulers, held against what diffusers' own schedulers do."""

from __future__ import annotations

import math
from typing import Any

import diffusers
import pytest
import torch

from hasten.core.intercept import intercept
from hasten.core.noise import convert
from hasten.core.sampler import SamplerFacts, adds_noise, sampler_facts
from tests.core.samplers import (
    DETERMINISTIC,
    LIMITING,
    STOCHASTIC,
    TOLERANCE,
    Case,
    Taken,
    between,
    case,
    draw,
    facts_of,
    restless,
    right,
    walk,
)

ALL = (*DETERMINISTIC, *LIMITING, *STOCHASTIC)
TRAILING = case("DDIM", "euler", clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=True,
                prediction_type="v_prediction")  # fmt: skip


def noised(scheduler: Any, index: int, clean: float, noise: float) -> float:
    """The scheduler's own mixture of picture and noise at a step."""
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(index)
        scheduler._step_index = None
    timestep, values = scheduler.timesteps[index][None], torch.tensor([clean, noise], dtype=torch.float64)
    if hasattr(scheduler, "scale_noise"):
        return scheduler.scale_noise(values[:1], timestep, values[1:]).item()
    return scheduler.add_noise(values[:1], values[1:], timestep).item()


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_levels_are_the_schedulers_own(kind: Case) -> None:
    scheduler = kind.build()
    facts = facts_of(scheduler)
    assert len(facts.levels) == len(scheduler.timesteps) + 1 == facts.steps + 1
    for index, (level, factor) in enumerate(zip(facts.levels[:-1], facts.factors, strict=False)):
        if kind.name == "KDPM2Discrete" and index % 2:
            continue  # its own method knows nothing of the levels between; `walk` does
        assert noised(scheduler, index, 1, 0) * factor == pytest.approx(1 - level.flow_time, rel=1e-5, abs=1e-7)
        assert noised(scheduler, index, 0, 1) * factor == pytest.approx(level.flow_time, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("kind", DETERMINISTIC, ids=str)
@pytest.mark.parametrize("steps", [1, 4, 12, 20])
def test_a_denoiser_that_is_right_leads_along_the_levels(kind: Case, steps: int) -> None:
    if steps < 4 and (kind.name == "PNDM" or "shift_terminal" in kind.config):
        pytest.skip("diffusers' own does not work with a single step")
    scheduler = kind.build(steps)
    facts = facts_of(scheduler)
    for taken in walk(scheduler, right(facts)):
        level = facts.levels[taken.index]
        torch.testing.assert_close(taken.seen / level.scale, taken.before * facts.factors[taken.index])
        there = facts.reached[taken.index]
        arrived = taken.after * (1 - there.flow_time if facts.scaled else 1 / there.scale)
        torch.testing.assert_close(arrived, between(there, draw(0), draw(1)), rtol=0, atol=TOLERANCE)


def error_of_euler(facts: SamplerFacts, taken: Taken) -> float:
    """How far a step is from Euler's, in xh."""
    here, following = facts.levels[taken.index], facts.levels[taken.index + 1]
    velocity = convert(taken.output, taken.seen, here, facts.prediction, "flow_prediction")
    expected = taken.before * facts.factors[taken.index] + (following.flow_time - here.flow_time) * velocity
    return (taken.after * facts.factors[taken.index + 1] - expected).abs().max().item()


@pytest.mark.parametrize("kind", [*DETERMINISTIC, *LIMITING], ids=str)
def test_the_steps_of_euler_and_of_no_others_are_eulers(kind: Case) -> None:
    scheduler = kind.build()
    facts = facts_of(scheduler)
    assert facts.euler is (kind.solver == "euler")
    errors = [error_of_euler(facts, taken) for taken in walk(scheduler, restless(facts))]
    assert max(errors) < 1e-5 if facts.euler else max(errors) > 1e-2


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_solver_and_calls(kind: Case) -> None:
    facts = facts_of(kind.build())
    assert (facts.solver, facts.calls_per_step, facts.stochastic) == (kind.solver, kind.calls, kind.stochastic)


@pytest.mark.parametrize("kind", [kind for kind in DETERMINISTIC if kind.solver == "dpmpp_2m"], ids=str)
def test_the_two_step_method_is_the_published_one(kind: Case) -> None:
    """DPM-Solver++ (Lu et al. 2022), algorithm 2: x' = (sigma'/sigma) x + alpha' (1 - exp(-h)) D."""
    scheduler = kind.build(20)
    facts, pictures = facts_of(scheduler), list[torch.Tensor]()
    for taken in walk(scheduler, restless(facts)):
        here, following = facts.levels[taken.index], facts.levels[taken.index + 1]
        pictures.append(convert(taken.output, taken.seen, here, facts.prediction, "sample"))
        h = following.log_snr - here.log_snr
        data = pictures[-1]
        if taken.index and not math.isinf(h):
            r = (here.log_snr - facts.levels[taken.index - 1].log_snr) / h
            data = (1 + 1 / (2 * r)) * pictures[-1] - 1 / (2 * r) * pictures[-2]
        expected = following.sigma / here.sigma * taken.before + following.alpha * (1 - math.exp(-h)) * data
        torch.testing.assert_close(taken.after, expected, rtol=1e-3, atol=1e-3)


def test_rounded_timesteps_lead_elsewhere_and_the_moves_know() -> None:
    """DDIM steps by whole strides from timesteps that lie a fraction more apart."""
    scheduler = TRAILING.build(28)
    facts = facts_of(scheduler)
    assert facts.solver == "euler"
    assert not facts.euler
    assert facts.levels[0].alpha == 0
    assert facts.reached != facts.levels[1:]
    for taken in walk(scheduler, restless(facts)):
        stretch, weight = facts.move(taken.index)
        velocity = convert(taken.output, taken.seen, facts.levels[taken.index], facts.prediction, "flow_prediction")
        expected = stretch * taken.before * facts.factors[taken.index] + weight * velocity
        torch.testing.assert_close(taken.after * facts.factors[taken.index + 1], expected, rtol=0, atol=1e-5)
    assert facts_of(TRAILING.build(20)).euler


@pytest.mark.parametrize("kind", [kind for kind in DETERMINISTIC if kind.solver == "euler"], ids=str)
def test_moves_are_differences_of_flow_time(kind: Case) -> None:
    facts = facts_of(kind.build())
    times = [level.flow_time for level in facts.levels]
    for step in range(facts.steps):
        assert facts.move(step) == pytest.approx((1, times[step + 1] - times[step]), rel=1e-4, abs=1e-7)


def differs(scheduler: Any, **given: Any) -> bool:
    """Do two generators give two results?"""
    ends = list[torch.Tensor]()
    for seed in (1, 2):
        scheduler.set_timesteps(scheduler.num_inference_steps, **scheduler_needs(scheduler))
        options = {"generator": torch.Generator().manual_seed(seed)} if takes_generator(scheduler) else {}
        torch.manual_seed(seed)
        ends.append([*walk(scheduler, right(facts_of(scheduler)), **options, **given)][-1].after)
    return not torch.equal(*ends)


def scheduler_needs(scheduler: Any) -> dict[str, float]:
    return {"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}


def takes_generator(scheduler: Any) -> bool:
    return "generator" in scheduler.step.__code__.co_varnames


@pytest.mark.parametrize("kind", ALL, ids=str)
def test_noise_is_added_where_it_is_said(kind: Case) -> None:
    scheduler = kind.build()
    assert differs(scheduler) is facts_of(scheduler).stochastic is adds_noise(scheduler, {})


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        (case("DDIM", clip_sample=False), {"eta": 0.5}),
        (case("DDIM", clip_sample=False), {"eta": 0.0}),
        (case("TCD"), {"eta": 0.0}),
        (case("TCD"), {"eta": 0.5}),
        (case("EulerDiscrete"), {"s_churn": 5.0}),
        (case("FlowMatchHeunDiscrete"), {"s_churn": 5.0}),
        (case("FlowMatchEulerDiscrete"), {"s_churn": 5.0}),
    ],
)
def test_arguments_of_the_step_decide_too(kind: Case, given: dict[str, float]) -> None:
    scheduler = kind.build()
    assert adds_noise(scheduler, given) is differs(scheduler, **given)
    assert adds_noise(scheduler, {}, [*given.values()]) is adds_noise(scheduler, given)


class Unchanged(diffusers.EulerDiscreteScheduler):
    """A subclass that adds nothing to the steps."""


class Changed(diffusers.EulerDiscreteScheduler):
    """A subclass that steps in its own way."""

    def step(self, *args: Any, **kwargs: Any) -> Any:
        return super().step(*args, **kwargs)


def test_a_subclass_is_known_if_it_steps_the_same_way() -> None:
    own, changed = Unchanged(), Changed()
    for scheduler in (own, changed):
        scheduler.set_timesteps(5)
    assert facts_of(own) == facts_of(case("EulerDiscrete").build(5))
    assert sampler_facts(changed) is None
    assert adds_noise(changed, {})


def test_an_intercepted_scheduler_is_known() -> None:
    scheduler = case("DDIM").build()
    before = sampler_facts(scheduler)
    undo = intercept(scheduler, "step", lambda call, *args, **kwargs: call(*args, **kwargs))
    assert sampler_facts(scheduler) == before
    assert not adds_noise(scheduler, {}, (0.0,))
    undo()


@pytest.mark.parametrize(
    "kind",
    [
        case("EDMEuler"),
        case("EDMDPMSolverMultistep"),
        case("IPNDM"),
        case("DDIMInverse"),
        case("FlowMatchEulerDiscrete", invert_sigmas=True),
        case("DPMSolverMultistep", prediction_type="flow_prediction"),
        case("UniPCMultistep", prediction_type="v_prediction", use_flow_sigmas=True),
        case("DDIM", prediction_type="epsilon", rescale_betas_zero_snr=True, timestep_spacing="trailing"),
    ],
    ids=str,
)
def test_of_others_nothing_is_claimed(kind: Case) -> None:
    assert sampler_facts(kind.build()) is None


def test_of_things_that_are_no_schedulers_or_not_set_nothing_is_claimed() -> None:
    assert sampler_facts(object()) is None
    assert adds_noise(object(), {})
    for name in ("DDIM", "PNDM", "FlowMatchEulerDiscrete", "DPMSolverMultistep"):
        assert sampler_facts(getattr(diffusers, f"{name}Scheduler")()) is None


@pytest.mark.parametrize("kind", DETERMINISTIC, ids=str)
def test_a_late_beginning(kind: Case) -> None:
    scheduler, begin = kind.build(), 4
    whole = facts_of(scheduler)
    if kind.name in ("PNDM", "LMSDiscrete"):
        assert sampler_facts(scheduler, begin) is None
        return
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
        assert sampler_facts(scheduler) == whole.since(begin)
    facts = sampler_facts(scheduler, begin)
    assert facts is not None
    assert facts.levels == whole.levels[begin:]
    assert facts.since(facts.steps + 1) is None
    assert (whole.since(3) is None) is (kind.calls > 1)
