"""Another solver on the same noise schedule: exact where it must be, better where it claims to be, and off again."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

import hasten
from hasten.core.errors import HastenError, UnknownName
from hasten.measure.rendering import arguments
from hasten.measure.solvers import SOLVERS, Solver, grid_of, other_solver, solver_for, solver_problem

BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def ddim(**changes: Any) -> Any:
    settings: dict[str, Any] = BETAS | {"timestep_spacing": "trailing", "clip_sample": False} | changes
    return DDIMScheduler(**settings)


def flow(**changes: Any) -> Any:
    settings: dict[str, Any] = {"shift": 3.0} | changes
    return FlowMatchEulerDiscreteScheduler(**settings)


def sampled(scheduler: Any, steps: int, *, spread: float = 0.5) -> torch.Tensor:
    """The scheduler's own way through the exact field of Gaussian data with the given spread around 1."""
    flows = scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"
    scheduler.set_timesteps(steps, **{"sigmas": [1 - place / steps for place in range(steps)]} if flows else {})
    levels = [signal_and_noise(scheduler, place) for place in range(steps)]
    x = torch.linspace(-2, 2, 9).reshape(1, 9, 1, 1)
    for timestep, (alpha, sigma) in zip(scheduler.timesteps, levels, strict=True):
        clean = 1 + alpha * spread**2 / (alpha**2 * spread**2 + sigma**2) * (x - alpha)
        noise = (x - alpha * clean) / sigma
        prediction = scheduler.config.get("prediction_type", "flow_prediction")
        output = {"epsilon": noise, "v_prediction": alpha * noise - sigma * clean, "flow_prediction": noise - clean}
        x = scheduler.step(output[prediction], timestep, x, return_dict=False)[0]
    return x


def signal_and_noise(scheduler: Any, place: int) -> tuple[float, float]:
    sigma = float(grid_of(scheduler)[1][place])
    if scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction":
        return 1 - sigma, sigma
    return (1 + sigma**2) ** -0.5, sigma * (1 + sigma**2) ** -0.5


def error(scheduler: Any, steps: int, truth: torch.Tensor) -> float:
    return float((sampled(scheduler, steps) - truth).abs().max())


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("make", [flow, lambda: ddim(prediction_type="v_prediction"), ddim], ids=["flow", "v", "eps"])
def test_many_steps_of_any_solver_arrive_where_the_original_does(solver: Solver, make: Any) -> None:
    truth = sampled(make(), 500)
    assert error(solver_for(make(), solver), 250, truth) < 0.01


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("make", [flow, lambda: ddim(prediction_type="v_prediction")], ids=["flow", "v"])
def test_few_steps_are_nearer_to_the_truth_than_the_original_solver(solver: Solver, make: Any) -> None:
    truth = sampled(solver_for(make(), "ab2"), 500)
    assert error(solver_for(make(), solver), 25, truth) < 0.7 * error(make(), 25, truth)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_step_is_eulers_whatever_the_solver(solver: Solver) -> None:
    torch.testing.assert_close(sampled(solver_for(flow(), solver), 1), sampled(flow(), 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("terminal", [False, True], ids=["some signal left", "pure noise"])
def test_timesteps_and_noise_levels_stay_those_of_the_original(solver: Solver, terminal: bool) -> None:
    for make in (flow, lambda: ddim(rescale_betas_zero_snr=terminal, prediction_type="v_prediction")):
        origin, other = make(), make()
        other.set_timesteps(17)
        solver_made = solver_for(origin, solver)
        solver_made.set_timesteps(17)
        assert torch.equal(solver_made.timesteps, other.timesteps)
        assert torch.equal(solver_made.sigmas, grid_of(other)[1])
        assert torch.isfinite(solver_made.sigmas).all()


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_request_that_enters_late_knows_nothing_of_the_one_before(solver: Solver) -> None:
    used, fresh = solver_for(flow(), solver), solver_for(flow(), solver)
    sampled(used, 9)
    reached: list[torch.Tensor] = []
    for scheduler in (used, fresh):
        scheduler.set_timesteps(6)
        scheduler.set_begin_index(2)
        x = torch.linspace(-1, 1, 8).reshape(1, 8, 1, 1)
        reached.append(scheduler.step(2 * x, scheduler.timesteps[2], x, return_dict=False)[0])
    assert torch.equal(*reached)


def test_dpm_on_its_own_grid_is_diffusers_own() -> None:
    settings: dict[str, Any] = BETAS | {"timestep_spacing": "trailing"}
    own = DPMSolverMultistepScheduler(**settings)
    swapped = solver_for(EulerDiscreteScheduler(**settings), "dpm++")
    own.set_timesteps(12)
    swapped.set_timesteps(12)
    torch.testing.assert_close(swapped.sigmas, own.sigmas, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sampled(swapped, 12), sampled(own, 12), rtol=1e-3, atol=1e-3)


def test_repeated_timesteps_of_pndm_are_taken_once() -> None:
    settings: dict[str, Any] = BETAS | {"skip_prk_steps": True}
    swapped = solver_for(PNDMScheduler(**settings), "unipc")
    swapped.set_timesteps(10)
    assert len(swapped.timesteps) == len(set(swapped.timesteps.tolist())) == swapped.num_inference_steps == 10


def test_the_solver_takes_the_arguments_and_settings_of_the_original() -> None:
    swapped = solver_for(flow(use_dynamic_shifting=True, base_shift=0.7), "unipc")
    assert {"sigmas", "mu"} <= set(inspect.signature(swapped.set_timesteps).parameters)
    assert swapped.config.base_shift == 0.7
    swapped.set_timesteps(sigmas=[1.0, 0.6, 0.3], mu=0.5)
    assert len(swapped.timesteps) == 3
    assert callable(swapped.scale_noise)


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (LCMScheduler(), "distilled"),
        (EulerAncestralDiscreteScheduler(), "stochastic"),
        (HeunDiscreteScheduler(), "2 times a step"),
        (flow(stochastic_sampling=True), "adds noise"),
        (None, "no scheduler"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_has_no_counterpart_is_refused_in_words(scheduler: Any, words: str) -> None:
    assert words in (solver_problem(scheduler) or "")
    with pytest.raises(HastenError, match=words):
        solver_for(scheduler)


def test_without_a_name_the_family_decides() -> None:
    assert isinstance(solver_for(flow()), UniPCMultistepScheduler)
    assert isinstance(solver_for(ddim()), DPMSolverMultistepScheduler)


def test_an_unknown_solver_suggests_a_known_one() -> None:
    with pytest.raises(UnknownName, match="unipc"):
        solver_for(ddim(), "unicp")  # type: ignore[arg-type]
    assert solver_problem(UniPCMultistepScheduler()) is None


class _Pipeline:
    def __init__(self) -> None:
        self.scheduler = ddim()


def fail_inside(pipeline: _Pipeline) -> None:
    before = pipeline.scheduler
    with other_solver(pipeline) as solver:
        assert pipeline.scheduler is solver is not before
        raise KeyError


def test_the_original_comes_back_also_after_an_exception() -> None:
    pipeline = _Pipeline()
    before = pipeline.scheduler
    with pytest.raises(KeyError):
        fail_inside(pipeline)
    assert pipeline.scheduler is before


@pytest.mark.parametrize("name", ["emoji-flux", "emoji-dit"])
def test_a_bundled_model_comes_nearer_to_its_converged_picture(name: str) -> None:
    model = hasten.load(name, device="cpu")

    def picture(steps: int) -> torch.Tensor:
        workload = model.workload.replace(steps=steps)
        return torch.from_numpy(model.pipeline(**arguments(model.pipeline, workload, workload.prompts[0], 0)).images)

    before = picture(8)
    with other_solver(model.pipeline, "dpm++"):
        converged, better = picture(40), picture(8)
    assert (better - converged).square().mean() < (before - converged).square().mean()
    assert torch.equal(picture(8), before)
