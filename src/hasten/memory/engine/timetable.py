"""The timesteps of a whole request, in the very form in which the denoiser is given them.

Pipelines change the scheduler's timesteps on the way: they divide by 1000, turn them round, round to bfloat16, or
give every token its own. What a schedule's steps were given as is remembered; for a schedule that has not been seen
yet it is inferred from the present call, and each call is then compared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from hasten.core.clock import Clock

Form = Callable[[torch.Tensor, torch.dtype], torch.Tensor]

FORMS: tuple[Form, ...] = (
    lambda time, kind: time.to(kind),
    lambda time, kind: time.to(kind) / 1000,
    lambda time, kind: (time / 1000).to(kind),
    lambda time, kind: ((1000 - time) / 1000).to(kind),
    lambda time, kind: (1000 - time.to(kind)) / 1000,
)
"""How pipelines are known to hand a scheduler's timestep on."""

ScheduleKey = tuple[float, ...]
MOST = 8
"""Schedules that are remembered; the oldest is forgotten first."""


class Timetable:
    """Remembers, for each schedule, what the denoiser was given at each step; tensors stay on their device."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._known: dict[ScheduleKey, dict[int, torch.Tensor]] = {}

    @property
    def key(self) -> ScheduleKey | None:
        """The noise levels of the present schedule, as host values; None where the scheduler is not known."""
        facts = self._clock.facts
        return None if facts is None else tuple(level.flow_time for level in facts.levels)

    def note(self, given: torch.Tensor) -> None:
        """Remember what the present step was given."""
        if self.key is not None:
            if self.key not in self._known and len(self._known) == MOST:
                self._known.pop(next(iter(self._known)))
            self._known.setdefault(self.key, {})[self._clock.now.step] = given.detach().clone()

    def forget(self) -> None:
        """Nothing that was remembered is to be trusted."""
        self._known.clear()

    def known(self, like: torch.Tensor) -> list[torch.Tensor] | None:
        """What all steps of the present schedule were given before, in the form of `like`, or None."""
        steps, seen = self._clock.now.steps or 0, self._known.get(self.key or (), {})
        if not steps or any(step not in seen or not _fits(seen[step], like) for step in range(steps)):
            return None
        return [seen[step].flatten()[: like.numel()].reshape(like.shape) for step in range(steps)]

    def inferred(self, timesteps: torch.Tensor, given: torch.Tensor) -> list[torch.Tensor]:
        """What all steps will presumably be given; waits for the GPU. Steps that cannot be told get the present one."""
        steps, step = self._clock.now.steps or 0, self._clock.now.step
        if not steps or len(timesteps) < steps:
            return [given] * max(steps, step + 1)
        times = timesteps[-steps:].to(given.device)
        for form in FORMS:
            if torch.equal(form(times[step], given.dtype).expand(given.shape), given):
                return [form(time, given.dtype).expand(given.shape) for time in times]
        return [given] * steps


def _fits(seen: torch.Tensor, like: torch.Tensor) -> bool:
    """Of a guided batch one half may be left out: all its rows are given the same."""
    return seen.dtype == like.dtype and seen.shape[1:] == like.shape[1:] and seen.numel() >= like.numel()
