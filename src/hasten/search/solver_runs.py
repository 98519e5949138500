"""Runs of another solver on a pipeline's own schedule: fewer, longer steps between chosen nodes of its grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hasten.cache.engine.corrector import point_at
from hasten.cache.engine.course import Course, Courses
from hasten.cache.engine.forecast_preset import ForecastCache
from hasten.cache.engine.rules import Rule
from hasten.cache.engine.statistics import Statistics
from hasten.core.clock import Clock
from hasten.core.noise import mixing
from hasten.core.patch import Patch
from hasten.core.sampler import SamplerFacts
from hasten.core.target import Target

HOLD = Rule("velocity", "index", 0)


@dataclass(frozen=True, kw_only=True)
class SecondOrder(ForecastCache):
    """DPM-Solver++(2M) (arXiv:2211.01095, midpoint) between the steps `nodes` of a sampler that is Euler in flow time.

    From node i to node j it goes straight to (s_j/s_i)*xh + (1-s_j/s_i)*D with D = x0 + e*(x0 - x0 before), so that
    the sampler's own steps between them only have to be given that direction.
    """

    nodes: tuple[int, ...] = (0,)

    def schedule(self, steps: int) -> tuple[int, ...]:
        """The nodes."""
        return self.nodes

    def courses(self, target: Target, patch: Patch, statistics: Statistics) -> Courses:
        """Computed at the nodes, held between them."""
        return Courses(patch.clock, lambda facts: Course(self.nodes, (HOLD,) * len(self.nodes)))

    def apply(self, target: Target, patch: Patch) -> None:
        """Hold outputs, and change what the scheduler is given."""
        super().apply(target, patch)
        link = Directions(self.nodes, patch.clock)
        patch.clock.around_step(link, patch, "takes longer steps of second order")


class Directions:
    """Stands around the scheduler's step and replaces the velocity by the direction of the solver's step."""

    def __init__(self, nodes: tuple[int, ...], clock: Clock) -> None:
        self._nodes, self._clock = nodes, clock
        self._request = -1
        self._before: tuple[int, torch.Tensor] | None = None
        self._direction: torch.Tensor | None = None

    def __call__(
        self, call: Callable[..., Any], output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Give the scheduler the direction in place of the velocity."""
        facts, moment = self._clock.facts, self._clock.now
        if facts is None or facts.solver != "euler":
            return call(output, timestep, sample, *args, **kwargs)
        if moment.request != self._request:
            self._request, self._before, self._direction = moment.request, None, None
        point = point_at(moment.step, output, sample, facts)
        if moment.step in self._nodes or self._direction is None:
            self._direction = self._turned(point.state, point.velocity, moment.step, facts)
        of_output, _ = mixing(facts.levels[moment.step], facts.prediction, "flow_prediction")
        changed = output.float() + (self._direction - point.velocity) / of_output
        return call(changed.to(output.dtype), timestep, sample, *args, **kwargs)

    def _turned(self, state: torch.Tensor, velocity: torch.Tensor, step: int, facts: SamplerFacts) -> torch.Tensor:
        time = facts.levels[step].flow_time
        clean = state - time * velocity
        before, self._before = self._before, (step, clean)
        if before is None:
            return velocity
        following = next((node for node in self._nodes if node > step), facts.steps)
        extra = extrapolation(*(facts.levels[node].flow_time for node in (before[0], step, following)))
        return velocity - extra * (clean - before[1]) / time


def extrapolation(before: float, here: float, following: float) -> float:
    """h/(2*h_before) in log(alpha/sigma); 0 where the solver takes a first-order step (from s = 1, to s = 0)."""
    if before >= 1 or following <= 0:
        return 0.0
    lam = [math.log((1 - time) / time) for time in (before, here, following)]
    return (lam[2] - lam[1]) / (2 * (lam[1] - lam[0]))
