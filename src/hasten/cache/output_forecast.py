"""OutputForecast: on most steps do not call the network at all, but forecast its output from the latest ones."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hasten.cache.engine.controller import ErrorControl
from hasten.cache.engine.course import BEND, Course, Courses, graded
from hasten.cache.engine.forecast_preset import ForecastCache
from hasten.cache.engine.policy import Guarded, Policy
from hasten.cache.engine.rules import Rule
from hasten.cache.engine.statistics import Statistics
from hasten.core.clock import Clock
from hasten.core.errors import InvalidSetting
from hasten.core.patch import Patch
from hasten.core.sampler import SamplerFacts
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about

CURVED, WIDE = 2, 4
"""Mean intervals up to which second order, and correction, are better than without (measured on the bundled models)."""
Quantity = Literal["velocity", "clean", "output"]
Variable = Literal["index", "flow_time", "angle"]


@dataclass(frozen=True, kw_only=True)
class OutputForecast(ForecastCache):
    """Computes one in `interval` steps, or `full_steps` in all, and forecasts the others without the network.

    Computed are the first step, the last one, and steps between them that lie closer at the beginning (`bend`), where
    outputs change fastest. The output is extrapolated as the velocity of a rectified flow, whatever the network
    predicts, and converted back with the noise level. With `correct`, each stretch of forecast steps is integrated
    again through the next true output: exact for samplers that are Euler in flow time (flow matching, DDIM, Euler),
    left out for others and over intervals of more than 4. With a `tolerance` nothing is fixed beforehand: each
    computed step shows how wrong the forecast was, and harder pictures get more steps; that waits for the GPU once a
    computed step. Memory is a few outputs, megabytes at most.
    """

    paper: ClassVar[str] = "multistep extrapolation; corrector after UniPC (NeurIPS 2023), arXiv:2302.04867"

    interval: int = field(default=2, metadata=about("every how many steps is computed, on average", ge=1, off=1))
    full_steps: int | None = field(
        default=None, metadata=about("how many steps are computed, in place of an interval", ge=1, budget="count")
    )
    order: int = field(
        default=1,
        metadata=about("degree of the extrapolation; 0 holds; 2 is for half of the steps or more", ge=0, le=2),
    )
    quantity: Quantity = field(default="velocity", metadata=about("what is extrapolated: velocity, clean or output"))
    bend: float = field(
        default=BEND, metadata=about("how much denser computed steps lie at the beginning; 1 is even", ge=1.0, le=3.0)
    )
    variable: Variable = field(default="index", metadata=about("along what: index, flow_time or angle"))
    trust: float = field(
        default=0.5, metadata=about("how much of the extrapolated change is believed; 0 holds", ge=0.0, le=1.0)
    )
    correct: bool = field(default=True, metadata=about("integrate forecast steps again through the next true output"))
    tolerance: float | None = field(
        default=None, metadata=about("error a stretch of steps may make, in place of an interval", gt=0.0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tolerance is not None and self.full_steps is not None:
            raise InvalidSetting("OutputForecast takes a tolerance or full_steps, not both.")

    def problems(self, target: Target) -> Iterable[str]:
        """A sampler that adds noise cannot be forecast, and curves over wide gaps lead astray."""
        yield from super().problems(target)
        if self.order == 2 and self.tolerance is None and self.full_steps is None and self.interval > 2:
            yield f"order=2 goes astray over {self.interval} steps; use it with interval=2, or order=1."

    def rule(self, steps: int) -> Rule:
        """The rule of a request: second order where half of the steps are computed, correction where a quarter is."""
        computed = steps if self.tolerance is not None else len(self.schedule(steps))
        order = min(self.order, 2 if CURVED * computed >= steps else 1)
        return Rule(self.quantity, self.variable, order, self.correct and WIDE * computed >= steps, self.trust)

    def schedule(self, steps: int) -> tuple[int, ...]:
        """From the first step to the last, denser at the beginning."""
        return graded(steps, self.full_steps or math.ceil(steps / self.interval), self.bend)

    def snapshots(self) -> int:
        """One more than the order."""
        return self.order + 1

    def courses(self, target: Target, patch: Patch, statistics: Statistics) -> Courses:
        """The same rule behind every computed step."""

        def make(facts: SamplerFacts) -> Course:
            compute = self.schedule(facts.steps)
            return Course(compute, (self.rule(facts.steps),) * len(compute))

        return Courses(patch.clock, make)

    def control(self, courses: Courses, clock: Clock) -> Policy:
        """The schedule, or the errors of the forecasts."""
        if self.tolerance is None:
            return super().control(courses, clock)
        return Guarded(ErrorControl(self.tolerance, clock), compute_last=True)

    def policy(self, denoiser: Denoiser) -> Policy:
        """As far as it is known beforehand."""
        return super().policy(denoiser) if self.tolerance is None else Policy()

    def in_words(self) -> str:
        """The interval, or what stands in its place."""
        if self.tolerance is not None:
            return f"is computed where forecasts would err by more than {self.tolerance:g}"
        often = f"in {self.full_steps} steps" if self.full_steps else f"once in {self.interval} steps"
        return f"is computed {often} and forecast in the others"
