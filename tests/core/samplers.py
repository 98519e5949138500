"""Real schedulers in many configurations, and loops over them with denoisers whose answers are known."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import pytest
import torch

from hasten.core.noise import NoiseLevel, Prediction, convert
from hasten.core.sampler import SamplerFacts, sampler_facts


@dataclass(frozen=True)
class Case:
    """A scheduler's class and configuration; `solver` and `stochastic` are what should be found out."""

    name: str
    solver: str = "other"
    stochastic: bool = False
    calls: int = 1
    config: dict[str, Any] = field(default_factory=dict[str, Any])

    def build(self, steps: int = 12) -> Any:
        """The scheduler after `set_timesteps`."""
        if self.name == "LMSDiscrete" and importlib.util.find_spec("scipy") is None:
            pytest.skip("diffusers needs scipy for this scheduler")
        scheduler = getattr(diffusers, f"{self.name}Scheduler")(**self.config)
        given = {"mu": 0.8} if self.config.get("use_dynamic_shifting") else {}
        scheduler.set_timesteps(steps, **given)
        return scheduler

    def __str__(self) -> str:
        return "-".join((self.name, *(f"{key}={value}" for key, value in self.config.items())))


def case(name: str, solver: str = "other", *, stochastic: bool = False, calls: int = 1, **config: Any) -> Case:
    return Case(name, solver, stochastic, calls, config)


_FLOW_DPM: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
_ZERO_SNR: dict[str, Any] = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
_KARRAS: dict[str, Any] = {"use_karras_sigmas": True}

DETERMINISTIC: tuple[Case, ...] = (
    case("FlowMatchEulerDiscrete", "euler"),
    case("FlowMatchEulerDiscrete", "euler", use_dynamic_shifting=True),
    case("FlowMatchEulerDiscrete", "euler", shift=3.0, shift_terminal=0.1),
    case("FlowMatchHeunDiscrete", calls=2),
    case("DDIM", "euler", clip_sample=False),
    case("DDIM", "euler", clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="sample"),
    case("DDIMParallel", "euler", clip_sample=False, prediction_type="v_prediction"),
    case("EulerDiscrete", "euler"),
    case("EulerDiscrete", "euler", prediction_type="sample", timestep_spacing="leading", steps_offset=1),
    case("EulerDiscrete", "euler", prediction_type="v_prediction", final_sigmas_type="sigma_min", **_KARRAS),
    case("EulerDiscrete", "euler", interpolation_type="log_linear"),
    case("EulerDiscrete", "euler", timestep_spacing="trailing", **_ZERO_SNR),
    case("HeunDiscrete", calls=2),
    case("HeunDiscrete", calls=2, prediction_type="v_prediction", **_KARRAS),
    case("KDPM2Discrete", calls=2),
    case("LMSDiscrete"),
    case("PNDM", calls=4),
    case("PNDM", skip_prk_steps=True, steps_offset=1),
    case("DPMSolverMultistep", "dpmpp_2m"),
    case("DPMSolverMultistep", "dpmpp_2m", **_KARRAS),
    case("DPMSolverMultistep", "dpmpp_2m", **_FLOW_DPM),
    case("DPMSolverMultistep", "dpmpp_2m", timestep_spacing="trailing", **_ZERO_SNR),
    case("DPMSolverMultistep", "euler", solver_order=1),
    case("DPMSolverMultistep", solver_order=3),
    case("DPMSolverMultistep", solver_type="heun"),
    case("DPMSolverMultistep", algorithm_type="dpmsolver", final_sigmas_type="sigma_min"),
    case("DPMSolverMultistep", "euler", algorithm_type="dpmsolver", solver_order=1, final_sigmas_type="sigma_min"),
    case("DPMSolverSinglestep", lower_order_final=True),
    case("DPMSolverSinglestep", "euler", solver_order=1, lower_order_final=True),
    case("DPMSolverSinglestep", lower_order_final=True, **_FLOW_DPM),
    case("UniPCMultistep", "unipc"),
    case("UniPCMultistep", "unipc", **_FLOW_DPM),
    case("UniPCMultistep", "unipc", solver_order=3, prediction_type="v_prediction"),
    case("DEISMultistep"),
    case("DEISMultistep", **_FLOW_DPM),
)
LIMITING: tuple[Case, ...] = (
    case("DDIM"),
    case("DDIM", clip_sample=False, thresholding=True),
    case("DPMSolverMultistep", thresholding=True, solver_order=1),
)
STOCHASTIC: tuple[Case, ...] = (
    case("FlowMatchEulerDiscrete", stochastic=True, stochastic_sampling=True),
    case("DDPM", stochastic=True, clip_sample=False),
    case("LCM", stochastic=True),
    case("TCD", stochastic=True),
    case("EulerAncestralDiscrete", stochastic=True),
    case("DPMSolverMultistep", stochastic=True, algorithm_type="sde-dpmsolver++"),
    case("DPMSolverSinglestep", stochastic=True, algorithm_type="sde-dpmsolver++", lower_order_final=True),
    case("SASolver", stochastic=True),
)
# A noise prediction divides by alpha, down to 0.006 here, what schedulers compute in float32.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Taken:
    """One step: the denoiser's input and answer, and the scheduler's sample before and after."""

    index: int
    seen: torch.Tensor
    output: torch.Tensor
    before: torch.Tensor
    after: torch.Tensor


def facts_of(scheduler: Any) -> SamplerFacts:
    facts = sampler_facts(scheduler)
    assert facts is not None
    return facts


def draw(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def between(level: NoiseLevel, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The rescaled input xh at a level."""
    return (1 - level.flow_time) * clean + level.flow_time * noise


def walk(
    scheduler: Any, answer: Callable[[int, torch.Tensor], torch.Tensor], *, begin: int = 0, **given: Any
) -> Iterator[Taken]:
    """Sample as a pipeline does, from the line between two fixed draws."""
    facts = facts_of(scheduler)
    sample = between(facts.levels[0], draw(0), draw(1)) / facts.factors[0]
    for index, timestep in enumerate(scheduler.timesteps[begin:]):
        scale = getattr(scheduler, "scale_model_input", None)
        seen = sample if scale is None else scale(sample, timestep)
        output = answer(index, seen)
        after = scheduler.step(output, timestep, sample, return_dict=False, **given)[0].double()
        yield Taken(index, seen, output, sample, after)
        sample = after


def right(facts: SamplerFacts) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A denoiser that knows picture and noise: its velocity is the same at every level."""

    def answer(index: int, seen: torch.Tensor) -> torch.Tensor:
        level = facts.levels[index]
        forms: dict[Prediction, torch.Tensor] = {
            "epsilon": draw(1),
            "sample": draw(0),
            "v_prediction": level.alpha * draw(1) - level.sigma * draw(0),
            "flow_prediction": draw(1) - draw(0),
        }
        return forms[facts.prediction]

    return answer


def restless(facts: SamplerFacts) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """A denoiser with another velocity at every step, so that solvers differ."""

    def answer(index: int, seen: torch.Tensor) -> torch.Tensor:
        level = facts.levels[index]
        return convert(draw(index + 2), seen, level, "flow_prediction", facts.prediction)

    return answer
