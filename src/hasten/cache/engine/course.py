"""The course of a request: which steps are computed, and by which rule the steps behind each are guessed."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass

from hasten.cache.engine.rules import Quantity, Rule
from hasten.core.clock import Clock
from hasten.core.sampler import SamplerFacts

BEND = 1.25
"""How much denser full steps lie at the beginning, where nothing better is known (measured on the bundled models)."""
UNKNOWN = "the sampler is not known"
SEVERAL = "the sampler makes several calls per step"


@dataclass(frozen=True)
class Course:
    """Full steps in rising order, step 0 first, with one rule for the steps behind each."""

    compute: tuple[int, ...]
    rules: tuple[Rule, ...]

    def rule(self, start: int) -> Rule:
        """The rule for the steps behind the computed step `start`, which may be one that was not planned."""
        return self.rules[max(bisect.bisect_right(self.compute, start) - 1, 0)]

    @property
    def quantities(self) -> tuple[Quantity, ...]:
        """What has to be remembered of computed outputs."""
        return tuple(sorted({rule.quantity for rule in self.rules}))

    @property
    def snapshots(self) -> int:
        """How many computed outputs the forecasts need."""
        return 1 + max(rule.order for rule in self.rules)


def graded(steps: int, full_steps: int, bend: float) -> tuple[int, ...]:
    """Full steps from the first to the last with intervals that grow on the way: the k-th at (k/(B-1))^bend.

    With a bend of 1 the intervals are even. Every full step is at least one further than the one before.
    """
    count = max(1, min(full_steps, steps))
    chosen = [0]
    for k in range(1, count):
        wanted = math.floor((steps - 1) * (k / (count - 1)) ** bend + 0.5)
        chosen.append(min(max(wanted, chosen[-1] + 1), steps - count + k))  # leaves room for those that follow
    return tuple(chosen)


class Courses:
    """The course of the present request, made when it is first asked for; one per session."""

    def __init__(self, clock: Clock, make: Callable[[SamplerFacts], Course]) -> None:
        self._clock, self._make = clock, make
        self._request = -1
        self._course: Course | None = None

    @property
    def now(self) -> Course | None:
        """The course; None where nothing is known about the sampler, so that nothing can be guessed."""
        if self._clock.now.request != self._request:
            facts = self._clock.facts
            self._course = None if facts is None else self._make(facts)
            self._request = self._clock.now.request
        return self._course

    def computes(self, step: int, steps: int | None) -> bool:
        """Is this step to be computed? Without a course none is wanted, so that all are counted as obstructed."""
        course = self.now
        return course is not None and step in course.compute
