"""What a scheduler does in the current request, as host values: noise levels, parametrization, solver, randomness.

Formulas in `core.noise`; what is known about each scheduler in `core.schedulers`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hasten.core.errors import HastenError
from hasten.core.intercept import base_class
from hasten.core.noise import NoiseLevel, Prediction
from hasten.core.schedulers import Kind, Path, Solver, kind_of


@dataclass(frozen=True)
class SamplerFacts:
    """What is known about the sampler of one request, as host values; n is its number of steps.

    A step is one call of the scheduler's `step`, with one denoiser output. `prediction` describes the output that
    `step` receives: some pipelines change its sign on the way there.
    """

    prediction: Prediction
    levels: tuple[NoiseLevel, ...]
    """n+1 levels: of the denoiser's input at each step, and of the result. Successive ones can be equal."""
    reached: tuple[NoiseLevel, ...]
    """n levels: where each step leads. DDIM's rounding of timesteps can make it differ from the next of `levels`."""
    scaled: bool
    """Does the scheduler keep x0 + sigma*noise (as in EDM) instead of the denoiser's input?"""
    stochastic: bool
    """Does `step` add noise when called with its default arguments? See `adds_noise`."""
    calls_per_step: int
    """Outputs that one interval of the schedule takes at most: 2 for Heun, 4 for Runge-Kutta."""
    solver: Solver
    whole: bool = False
    """Does the solver go astray when the first steps are left out?"""

    @property
    def steps(self) -> int:
        """Number of steps of the request."""
        return len(self.reached)

    @property
    def euler(self) -> bool:
        """Is `step`, called with its default arguments, exactly xh' = xh + (s' - s)*u, between successive `levels`?"""
        return self.solver == "euler" and all(
            math.isclose(there.flow_time, following.flow_time, rel_tol=1e-5, abs_tol=1e-7)
            for there, following in zip(self.reached, self.levels[1:], strict=True)
        )

    @property
    def factors(self) -> tuple[float, ...]:
        """For each of `levels`: what turns the sample that `step` takes or returns there into xh."""
        return tuple(self._factor(level) for level in self.levels)

    def move(self, step: int) -> tuple[float, float]:
        """The factors (a, b) in xh' = a*xh + b*u, from the input of this step to that of the next one.

        Right for the solver "euler", also where `reached` and `levels` differ; a = 1 where they do not.
        """
        here, there, following = self.levels[step], self.reached[step], self.levels[step + 1]
        scale = self._factor(following) / self._factor(there)
        return scale, scale * (there.flow_time - here.flow_time)

    def since(self, begin: int) -> SamplerFacts | None:
        """The facts of a request that leaves out the first `begin` steps; None where they would be other ones."""
        if not 0 <= begin <= self.steps or begin % self.calls_per_step or (begin and self.whole):
            return None
        return replace(self, levels=self.levels[begin:], reached=self.reached[begin:]) if begin else self

    def _factor(self, level: NoiseLevel) -> float:
        # With s = sigma/(alpha+sigma), EDM's x0 + (sigma/alpha)*noise is xh/(1-s).
        return 1 - level.flow_time if self.scaled else 1 / level.scale


def sampler_facts(scheduler: object, begin: int | None = None) -> SamplerFacts | None:
    """What a scheduler does after `set_timesteps`; None for one that is not known, or set in an unknown way.

    `begin` is the number of steps left out at the beginning, by default the scheduler's `begin_index`. Waits for a GPU
    where the scheduler keeps its schedule there.
    """
    kind, timesteps = kind_of(scheduler), getattr(scheduler, "timesteps", None)
    if kind is None or timesteps is None or not len(timesteps):
        return None
    try:
        path = kind.path(scheduler)
        if path is None or not len(path.levels) - 1 == len(path.reached) == len(timesteps):
            return None
        facts = _facts(scheduler, kind, path)
    except (HastenError, IndexError):
        return None
    return facts.since(int(getattr(scheduler, "begin_index", None) or 0) if begin is None else begin)


def adds_noise(scheduler: object, step_kwargs: Mapping[str, Any], step_args: Sequence[Any] = ()) -> bool:
    """Does a call of the scheduler's `step` add noise? `step_args` are the positional ones after `sample`.

    True for a scheduler that is not known.
    """
    kind = kind_of(scheduler)
    if kind is None:
        return True
    names = list(inspect.signature(base_class(scheduler).step).parameters)[4:]  # pyright: ignore
    return kind.noise(scheduler, dict(zip(names, step_args, strict=False)) | dict(step_kwargs))


def _facts(scheduler: object, kind: Kind, path: Path) -> SamplerFacts:
    if path.prediction == "epsilon" and any(level.alpha == 0 for level in path.levels):
        raise HastenError("Predicted noise says nothing about the picture in a request that begins at alpha = 0.")
    return SamplerFacts(
        prediction=path.prediction,
        levels=tuple(path.levels),
        reached=tuple(path.reached),
        scaled=kind.scaled,
        stochastic=kind.noise(scheduler, {}),
        calls_per_step=kind.calls(scheduler),
        solver=kind.solver(scheduler),
        whole=kind.whole,
    )
