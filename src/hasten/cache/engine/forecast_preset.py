"""The base of caches that forecast the whole output: a technique that only says which course a request takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from hasten.cache.engine.corrector import Corrector
from hasten.cache.engine.course import Courses
from hasten.cache.engine.forecast import Forecast
from hasten.cache.engine.guess import Hold
from hasten.cache.engine.output import OutputSite
from hasten.cache.engine.policy import Fixed, Policy
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.problems import noisy_sampler
from hasten.cache.engine.runner import Runner
from hasten.cache.engine.statistics import Statistics
from hasten.core.clock import Clock
from hasten.core.patch import Patch
from hasten.core.schedule import can_be_watched
from hasten.core.target import Denoiser, Target


@dataclass(frozen=True, kw_only=True)
class ForecastCache(Cache):
    """Computes the steps of a course and forecasts the output of the others; the network is not called for those.

    A subclass says `courses`, `schedule`, `snapshots`, and `control` where more than the course decides.
    """

    def courses(self, target: Target, patch: Patch, statistics: Statistics) -> Courses:
        """Makes the course of each request."""
        raise NotImplementedError

    def schedule(self, steps: int) -> tuple[int, ...]:
        """The full steps of a request of so many steps, as far as they are known beforehand."""
        raise NotImplementedError

    def snapshots(self) -> int:
        """The most computed outputs that a forecast needs."""
        return 2

    def control(self, courses: Courses, clock: Clock) -> Policy:
        """When to compute; made anew for each request."""
        return Fixed(courses.computes)

    def problems(self, target: Target) -> Iterable[str]:
        """A sampler that adds noise cannot be forecast."""
        return noisy_sampler(target)

    def site(self, denoiser: Denoiser) -> OutputSite:
        """The whole output."""
        return OutputSite()

    def policy(self, denoiser: Denoiser) -> Policy:
        """The schedule as it is known beforehand."""
        return Fixed(lambda step, steps: steps is None or step in self.schedule(steps))

    def guess(self) -> Hold:
        """Stands for the memory of the forecasts when nothing is installed."""
        hold = Hold()
        hold.snapshots = self.snapshots()
        return hold

    def apply(self, target: Target, patch: Patch) -> None:
        """Put a runner around every denoiser, and the corrector around the scheduler's steps."""
        statistics, clock = patch.keep(Statistics()), patch.clock
        courses = self.courses(target, patch, statistics)
        for denoiser in target.denoisers:
            forecast = Forecast(denoiser, clock, courses, self.snapshots())
            runner = Runner(
                denoiser, OutputSite(), lambda: self.control(courses, clock), forecast, clock, statistics
            )  # fmt: skip
            runner.install(patch, self.in_words())
        if can_be_watched(target.scheduler):
            clock.around_step(Corrector(clock, courses, statistics), patch, "integrates forecast steps again")
