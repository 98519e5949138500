"""Integrates skipped steps again, through the next true output, by correcting the sample that the scheduler is given.

Source: the corrector of UniPC (Zhao et al. 2023, arXiv:2302.04867), for steps that a sampler has already taken. It is
exact for samplers whose step is xh' = a*xh + b*u (`SamplerFacts.move`); others keep memories of their own and are let
be. Pipelines that change the picture between steps (masks) are fine: only differences are integrated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hasten.cache.engine.course import Courses
from hasten.cache.engine.forecast import form_of
from hasten.cache.engine.rules import Rule, correction_weights, position
from hasten.cache.engine.statistics import Statistics
from hasten.core.clock import Clock
from hasten.core.noise import mixing
from hasten.core.sampler import SamplerFacts

AGAIN = "segments integrated again"
NOT_AGAIN = "steps taken by a sampler that cannot be corrected"


@dataclass(frozen=True)
class Point:
    """A step that was taken: state xh and velocity u after guidance, computed or guessed, in float32."""

    step: int
    state: torch.Tensor
    velocity: torch.Tensor


class Corrector:
    """Stands around the scheduler's `step`; see `Clock.around_step`."""

    def __init__(self, clock: Clock, courses: Courses, statistics: Statistics) -> None:
        self._clock, self._courses, self._statistics = clock, courses, statistics
        self._request = -1
        self._computed: list[Point] = []
        self._guessed: list[Point] = []

    def __call__(
        self, call: Callable[..., Any], output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Correct sample and output where a guessed segment ends, and remember the step."""
        facts = self._clock.facts
        if facts is not None and self._wanted():
            if facts.solver != "euler" or self._clock.noisy:
                self._statistics.notes[NOT_AGAIN] += 1
            elif _same_shape(output, sample):
                output, sample = self._passed(output, sample, facts)
        return call(output, timestep, sample, *args, **kwargs)

    def _wanted(self) -> bool:
        course = self._courses.now
        return course is not None and any(rule.correct for rule in course.rules)

    def _passed(
        self, output: torch.Tensor, sample: torch.Tensor, facts: SamplerFacts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        moment = self._clock.now
        if moment.request != self._request:
            self._request, self._computed, self._guessed = moment.request, [], []
        if moment.step >= facts.steps:
            return output, sample
        point = point_at(moment.step, output, sample, facts)
        if not self._statistics.complete(moment):
            self._guessed.append(point)
            return output, sample
        moved = self._corrected(point, output, sample, facts)
        self._computed = [] if moment.last else [*self._computed, point][-3:]
        self._guessed = []
        return moved

    def _corrected(
        self, landed: Point, output: torch.Tensor, sample: torch.Tensor, facts: SamplerFacts
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rule = self._rule(landed)
        if rule is None:
            return output, sample
        self._statistics.notes[AGAIN] += 1
        shift = integrated_again(rule, self._computed, self._guessed, landed, facts)
        return _moved(output, sample, landed, shift, rule, facts)

    def _rule(self, landed: Point) -> Rule | None:
        """The rule of the segment that ends here; None where nothing can or should be corrected."""
        course, start = self._courses.now, self._computed[-1].step if self._computed else -1
        steps = [point.step for point in self._guessed]
        if course is None or start < 0 or not steps or steps != list(range(start + 1, landed.step)):
            return None
        rule = course.rule(start)
        return rule if rule.correct else None


def integrated_again(
    rule: Rule, computed: Sequence[Point], guessed: Sequence[Point], landed: Point, facts: SamplerFacts
) -> torch.Tensor:
    """The difference, in xh, that integrating the `guessed` steps again makes at the step `landed`.

    Their values are interpolated between the newest `computed` points and the true output of `landed`, which was
    computed at the uncorrected state.
    """
    nodes = [*computed[-max(rule.order, 1) :], landed]
    values = [_quantity(rule, point, facts) for point in nodes]
    places = [_place(rule, point.step, facts) for point in nodes]
    shift = torch.zeros_like(landed.state)
    for point in guessed:
        factors = correction_weights(places[:-1], places[-1], _place(rule, point.step, facts), rule.order)
        value = sum((factor * one for factor, one in zip(factors, values, strict=True)), torch.zeros_like(shift))
        velocity = _velocity(rule, value, point.state + shift, point.step, facts)
        of_state, of_velocity = facts.move(point.step)
        shift = of_state * shift + of_velocity * (velocity - point.velocity)
    return shift


def _moved(
    output: torch.Tensor, sample: torch.Tensor, landed: Point, shift: torch.Tensor, rule: Rule, facts: SamplerFacts
) -> tuple[torch.Tensor, torch.Tensor]:
    """The corrected sample, and the output that means the same quantity there."""
    level = facts.levels[landed.step]
    velocity = _velocity(rule, _quantity(rule, landed, facts), landed.state + shift, landed.step, facts)
    of_output, of_picture = mixing(level, facts.prediction, "flow_prediction")
    change = (velocity - landed.velocity - (of_picture * level.scale) * shift) / of_output
    moved = sample.float() + shift / facts.factors[landed.step]
    return (output.float() + change).to(output.dtype), moved.to(sample.dtype)


def point_at(step: int, output: torch.Tensor, sample: torch.Tensor, facts: SamplerFacts) -> Point:
    """A step as the scheduler is given it."""
    level = facts.levels[step]
    state = sample.float() * facts.factors[step]
    of_output, of_picture = mixing(level, facts.prediction, "flow_prediction")
    return Point(step, state, of_output * output.float() + (of_picture * level.scale) * state)


def _quantity(rule: Rule, point: Point, facts: SamplerFacts) -> torch.Tensor:
    level = facts.levels[point.step]
    p, q = mixing(level, "flow_prediction", form_of(rule.quantity, facts.prediction))
    return p * point.velocity + (q * level.scale) * point.state


def _velocity(rule: Rule, value: torch.Tensor, state: torch.Tensor, step: int, facts: SamplerFacts) -> torch.Tensor:
    level = facts.levels[step]
    p, q = mixing(level, form_of(rule.quantity, facts.prediction), "flow_prediction")
    return p * value + (q * level.scale) * state


def _place(rule: Rule, step: int, facts: SamplerFacts) -> float:
    level = facts.levels[step]
    return position(rule.variable, step, level.alpha, level.sigma)


def _same_shape(output: Any, sample: Any) -> bool:
    both = isinstance(output, torch.Tensor) and isinstance(sample, torch.Tensor)
    return both and output.shape == sample.shape and output.device == sample.device
