"""Another solver on the same noise schedule: what a cache has to beat at the same number of network evaluations.

A pipeline's scheduler fixes two things, where the noise levels are and how one is reached from the last. Here only
the second is exchanged: the original scheduler still chooses the noise levels and timesteps.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, Literal

import torch

from hasten.core.errors import HastenError, UnknownName

Solver = Literal["dpm++", "unipc", "ab2"]

#: DPM-Solver++(2M): Lu et al. 2022, arXiv:2211.01095; UniPC (order 2, bh2): Zhao et al. 2023, arXiv:2302.04867;
#: both are diffusers' code. Adams-Bashforth of order 2 in flow time sigma / (alpha + sigma), with unequal steps.
SOLVERS: tuple[Solver, ...] = ("dpm++", "unipc", "ab2")

TITLES: dict[Solver, str] = {"dpm++": "DPM++(2M)", "unipc": "UniPC", "ab2": "AB2"}
"""The solvers as reports name them."""

# Pure noise has no logarithm of the signal-to-noise ratio: multistep solvers start this far beside it.
_FLOW_START = 1 - 1e-6
_LEAST_SIGNAL = 2.0**-24


@contextmanager
def other_solver(pipeline: Any, solver: Solver | None = None) -> Generator[Any]:
    """Swap `pipeline.scheduler` for a second-order multistep solver; one network evaluation a step, as before.

    Without a name it is the one of `best_for`. Noise levels and timesteps stay those of the original scheduler, which
    comes back on leaving, also after an exception. Yields the solver. Raises UnknownName for a solver that is not in
    `SOLVERS`, and HastenError for pipelines whose scheduler has no such counterpart (stochastic and distilled ones,
    several evaluations a step).
    """
    origin = getattr(pipeline, "scheduler", None)
    swapped = solver_for(origin, solver)
    pipeline.scheduler = swapped
    try:
        yield swapped
    finally:
        pipeline.scheduler = origin


def best_for(scheduler: Any) -> Solver:
    """The solver that came nearest to the plain pictures at few steps (`benchmarks/caching/RESULTS.md`).

    UniPC on rectified flows; DPM-Solver++(2M) otherwise, where UniPC falls behind under guidance.
    """
    return "unipc" if _is_flow(scheduler) else "dpm++"


def solver_for(scheduler: Any, solver: Solver | None = None) -> Any:
    """A diffusers scheduler that takes the steps of `scheduler` with another solver; errors as `other_solver`."""
    if solver is not None and solver not in SOLVERS:
        raise UnknownName("solver", solver, SOLVERS)
    if problem := solver_problem(scheduler):
        raise HastenError(problem)
    return _build(scheduler, solver or best_for(scheduler))


def solver_problem(scheduler: Any) -> str | None:
    """Why no other deterministic solver can take this scheduler's steps, as a sentence; None if one can."""
    name = type(scheduler).__name__
    advice = "Use a pipeline with FlowMatchEulerDiscreteScheduler, DDIMScheduler or EulerDiscreteScheduler."
    if not callable(getattr(scheduler, "set_timesteps", None)):
        return f"There is no scheduler to exchange (found {name})."
    if getattr(scheduler, "order", 1) != 1:
        return f"{name} evaluates the network {scheduler.order} times a step. {advice}"
    if any(word in name for word in ("LCM", "TCD", "EDM", "Ancestral", "SDE", "DDPM")):
        return f"{name} is made for distilled, rescaled or stochastic sampling, which has no such solver. {advice}"
    config = scheduler.config
    if config.get("stochastic_sampling") or "sde" in str(config.get("algorithm_type", "")):
        return f"{name} adds noise at each step; a deterministic solver would not be comparable. {advice}"
    if not _is_flow(scheduler) and not hasattr(scheduler, "alphas_cumprod"):
        return f"{name} does not say how much noise its steps hold. {advice}"
    return None


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    flows = (type(scheduler).__name__.startswith("FlowMatch"), config.get("use_flow_sigmas"))
    return any(flows) or config.get("prediction_type") == "flow_prediction"


def _build(origin: Any, solver: Solver) -> Any:
    from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

    classes = {"dpm++": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler}
    parent: Any = classes.get(solver, DPMSolverMultistepScheduler)
    mixin = _AdamsBashforth if solver == "ab2" else _OnGridOf
    kind = type(parent.__name__, (mixin, parent), {"_levels": staticmethod(_levels(origin))})
    flow = _is_flow(origin)
    built = kind(prediction_type="flow_prediction" if flow else origin.config.prediction_type, solver_order=2)
    # Pipelines read settings such as `base_shift` from the scheduler they are given.
    known = dict(origin.config.items())
    built.register_to_config(**{k: v for k, v in known.items() if k not in built.config and not k.startswith("_")})
    built.follow(origin)
    return built


def _levels(origin: Any) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """The function that gives (alpha, sigma) of a solver's noise level: those of a rectified flow or of VP."""

    def flow(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return 1 - sigma, sigma

    def variance_preserving(sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        alpha = 1 / (sigma**2 + 1) ** 0.5
        return alpha, sigma * alpha

    return flow if _is_flow(origin) else variance_preserving


def grid_of(scheduler: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The n timesteps a scheduler was set to and the n + 1 noise levels, in the units of diffusers' `sigmas`.

    For flows sigma itself, otherwise sigma / alpha; the first is kept a rounding error away from pure noise.
    """
    timesteps = torch.unique_consecutive(scheduler.timesteps)  # PNDM repeats one
    if _is_flow(scheduler):
        return timesteps, scheduler.sigmas.to("cpu", torch.float32).clamp(max=_FLOW_START)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) == len(timesteps) + 1:
        return timesteps, sigmas.to("cpu", torch.float32)
    signal = scheduler.alphas_cumprod.double().clamp(min=_LEAST_SIGNAL).cpu()
    last = 1.0 if scheduler.config.get("set_alpha_to_one", True) else float(signal[0])
    levels = torch.cat([signal[timesteps.long().cpu()], torch.tensor([last], dtype=torch.float64)])
    return timesteps, ((1 - levels) / levels).sqrt().float()


class _OnGridOf:
    """Makes a diffusers solver stop at another scheduler's noise levels; a mixin before the solver's class."""

    _origin: Any = None
    _levels: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
    _before: tuple[float, torch.Tensor] | None = None

    def follow(self: Any, origin: Any) -> None:
        """Take timesteps and noise levels from `origin` from now on, and understand the same arguments."""
        self._origin = origin
        own = super().set_timesteps  # pyright: ignore[reportAttributeAccessIssue]  # of the solver's class

        @functools.wraps(origin.set_timesteps)  # pipelines look for `sigmas` and `mu` among the parameters
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            origin.set_timesteps(*args, **kwargs)
            timesteps, sigmas = grid_of(origin)
            own(len(timesteps), device=timesteps.device)
            self.timesteps, self.sigmas = timesteps, sigmas
            self.num_inference_steps = len(timesteps)
            self._before = None

        self.set_timesteps = set_timesteps

    def _sigma_to_alpha_sigma_t(self, sigma: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self._levels(sigma)

    def __getattr__(self, name: str) -> Any:
        """What the solver does not have (`scale_noise`, `time_shift`), the original scheduler may."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._origin, name)


class _AdamsBashforth(_OnGridOf):
    """x' = x + h (u + h / (2 h_before) (u - u_before)) in flow time; the first step is Euler's."""

    def step(
        self: Any,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | None = None,
        return_dict: bool = True,
    ) -> Any:
        """One step; the signature and the result are those of diffusers' schedulers."""
        from diffusers.schedulers.scheduling_utils import SchedulerOutput

        if self.step_index is None:
            self._init_step_index(timestep)
        reached = self._advance(model_output, sample.float()).to(model_output.dtype)
        self._step_index += 1
        return SchedulerOutput(prev_sample=reached) if return_dict else (reached,)

    def _advance(self: Any, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        index = self.step_index
        alpha, sigma = self._levels(self.sigmas[index])
        next_alpha, next_sigma = self._levels(self.sigmas[index + 1])
        clean = self.convert_model_output(model_output, sample=sample)
        velocity = (sample - alpha * clean) / sigma - clean
        time, next_time = (float(s / (a + s)) for a, s in ((alpha, sigma), (next_alpha, next_sigma)))
        slope = velocity
        if index > 0 and self._before is not None:
            before, old = self._before
            slope = velocity + (next_time - time) / (2 * (time - before)) * (velocity - old)
        self._before = time, velocity
        return (sample / (alpha + sigma) + (next_time - time) * slope) * (next_alpha + next_sigma)
