"""Runs of a pipeline for calibration: uncached ones that are recorded or disturbed, and ones that try a plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from hasten.cache.engine.corrector import Point, point_at
from hasten.cache.engine.course import Course, Courses
from hasten.cache.engine.forecast_preset import ForecastCache
from hasten.cache.engine.plan_store import grid_of
from hasten.cache.engine.records import Grid, Plan
from hasten.cache.engine.rules import parse_rule
from hasten.cache.engine.statistics import Statistics
from hasten.core.clock import Clock
from hasten.core.errors import HastenError
from hasten.core.patch import Patch
from hasten.core.recipe import Recipe
from hasten.core.sampler import SamplerFacts
from hasten.core.session import accelerate
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.measure.instruments import synchronize
from hasten.measure.rendering import render
from hasten.measure.runner import Picture

BEST = 99.0
"""PSNR in dB at which equal pictures are counted."""


@dataclass(frozen=True, kw_only=True)
class TrialPlan(ForecastCache):
    """Computes these steps and forecasts the others by these rules."""

    compute: tuple[int, ...] = (0,)
    rules: tuple[str, ...] = ("velocity/index/0",)

    def schedule(self, steps: int) -> tuple[int, ...]:
        """The steps, as far as there are so many."""
        return tuple(step for step in self.compute if step < steps)

    def snapshots(self) -> int:
        """As many as the highest order needs."""
        return Course(self.compute, tuple(map(parse_rule, self.rules))).snapshots

    def courses(self, target: Target, patch: Patch, statistics: Statistics) -> Courses:
        """The same course for every request."""
        course = Course(self.compute, tuple(map(parse_rule, self.rules)))
        return Courses(patch.clock, lambda facts: course)


@dataclass
class Watched:
    """One uncached run: what the scheduler was given at each step, and the state at the end."""

    kick_at: int | None = None
    kick: torch.Tensor | None = None
    """Added to the state xh at that step."""
    points: list[Point] = field(default_factory=list[Point])
    facts: SamplerFacts | None = None
    final: torch.Tensor | None = None

    @property
    def grid(self) -> Grid:
        """The sampler's noise levels; raises HastenError for a sampler that is not known or cannot be planned."""
        if self.facts is None:
            raise HastenError("The scheduler of this pipeline is not known, so that no plan can be made for it.")
        if self.facts.stochastic:
            raise HastenError("The scheduler adds noise at each step, so that no plan can be made for it.")
        return grid_of(self.facts)

    def link(self, clock: Clock) -> Callable[..., Any]:
        """What stands around the scheduler's step."""

        def step(call: Callable[..., Any], output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
            self.facts = facts = clock.facts
            if facts is None:
                return call(output, timestep, sample, *args, **kwargs)
            number = clock.now.step
            if number == self.kick_at and self.kick is not None:
                sample = (sample.float() + self.kick / facts.factors[number]).to(sample.dtype)
            self.points.append(point_at(number, output, sample, facts))
            result = call(output, timestep, sample, *args, **kwargs)
            if number == facts.steps - 1:
                reached = result[0] if isinstance(result, tuple) else result.prev_sample
                self.final = reached.float() * facts.factors[-1]
            return result

        return step


@dataclass(frozen=True)
class Bench:
    """A pipeline with what runs underneath, and the pictures to make; `advance` is called after each."""

    pipeline: Any
    recipe: Recipe
    workload: Workload
    advance: Callable[[], None]

    def watch(self, prompt: str, seed: int, run: Watched | None = None) -> Watched:
        """Make one uncached picture and return what was seen."""
        run = run or Watched()
        with ExitStack() as stack:
            if self.recipe.techniques:
                stack.enter_context(accelerate(self.pipeline, self.recipe))
            target, clock = Target.of(self.pipeline), Clock()
            patch = Patch(target.names(), lambda: clock)
            stack.callback(patch.close)
            clock.install(target, patch)
            clock.around_step(run.link(clock), patch)
            render(self.pipeline, self.workload, prompt, seed)
        self.advance()
        return run

    def pictures(self, recipe: Recipe, pictures: Sequence[Picture]) -> tuple[list[Image.Image], float]:
        """Make pictures with a recipe on top; returns them and the median of their seconds."""
        images: list[Image.Image] = []
        seconds: list[float] = []
        device = Target.of(self.pipeline).device
        with accelerate(self.pipeline, Recipe((*self.recipe.techniques, *recipe.techniques))):
            for prompt, seed in pictures:
                synchronize(device)
                began = time.perf_counter()
                images.append(render(self.pipeline, self.workload, prompt, seed))
                synchronize(device)
                seconds.append(time.perf_counter() - began)
                self.advance()
        return images, median(seconds)

    def plan(self, plan: Plan, pictures: Sequence[Picture]) -> tuple[list[Image.Image], float]:
        """Pictures with a plan, and the median of their seconds."""
        return self.pictures(Recipe((TrialPlan(compute=plan.compute, rules=plan.rules),)), pictures)


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures in dB, at most `BEST`."""
    wrong = float(np.square(_pixels(image) - _pixels(reference)).mean())
    return BEST if wrong == 0 else min(BEST, 10 * float(np.log10(255.0**2 / wrong)))


def _pixels(image: Image.Image) -> NDArray[np.float64]:
    return np.asarray(image, dtype=np.float64)
