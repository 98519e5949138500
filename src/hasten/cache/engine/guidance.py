"""Leaving out the unconditional half of guidance: its output is the conditional one less a difference kept earlier.

Guidance combines two outputs of one network for the same noisy picture. Pipelines make them in one call on a batch
of two halves, or in two calls; which half or call follows the prompt, the specification says.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from hasten.cache.engine.guess import Hold
from hasten.cache.engine.history import History, Snapshot, kind_of_call
from hasten.cache.engine.statistics import Statistics
from hasten.core.clock import Clock, Moment
from hasten.core.patch import Patch
from hasten.core.target import Denoiser

Given = Mapping[str, Any]
Choice = Literal["compute", "reuse", "off"]
Leaves = list[torch.Tensor]

CONDITIONAL, UNCONDITIONAL = "cond", "uncond"
CHANGED = "size, settings or adapters changed"


@dataclass(frozen=True)
class GuidanceSchedule:
    """What happens to guidance at each step: computed every `interval`-th step, off outside [start, stop).

    `start` and `stop` are shares of the request's steps.
    """

    interval: int
    start: float = 0.0
    stop: float = 1.0

    def at(self, step: int, steps: int | None) -> Choice:
        """The choice for a step; without a known number of steps guidance is never off."""
        first = 0 if steps is None else math.ceil(self.start * steps)
        if steps is not None and not first <= step < self.stop * steps:
            return "off"
        return "compute" if (step - first) % self.interval == 0 else "reuse"

    def computed(self, steps: int) -> int:
        """How many steps compute the unconditional output."""
        return sum(self.at(step, steps) == "compute" for step in range(steps))


class GuidanceRunner:
    """What both forms share: the schedule, what each request remembers, and the count. One per denoiser."""

    def __init__(
        self, denoiser: Denoiser, schedule: GuidanceSchedule, guess: Hold, clock: Clock, statistics: Statistics
    ) -> None:
        self.denoiser, self._schedule, self._guess = denoiser, schedule, guess
        self._clock, self._statistics = clock, statistics
        self._parameters = tuple(inspect.signature(denoiser.module.forward).parameters)
        self._request = -1

    def install(self, patch: Patch) -> None:
        """Intercept the denoiser's call."""
        patch.around(self.denoiser.module, self, "leaves out the unconditional half on reused steps")

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Make one denoiser call, whole, in part, or not at all."""
        moment = self._clock.now
        given = dict(zip(self._parameters, args, strict=False)) | kwargs
        if moment.request != self._request:
            self._request = moment.request
            self.forget()
        try:
            return self.run(call, moment, given, args, kwargs)
        except BaseException:
            self.forget()
            raise

    def run(self, call: Callable[..., Any], moment: Moment, given: Given, args: Any, kwargs: Any) -> Any:
        """Make the call."""
        raise NotImplementedError

    def forget(self) -> None:
        """Drop all that is remembered."""
        raise NotImplementedError

    def history(self) -> History:
        """A new memory of differences."""
        return History(self._guess.snapshots)

    def picture(self, given: Given) -> Any:
        """The noisy picture of a call: a tensor, or a list of tensors."""
        return given[self.denoiser.spec.latents]

    def kind(self, given: Given) -> object:
        """What must not change between computing and reusing."""
        return kind_of_call(given, (self.denoiser.spec.timestep,), self.denoiser.module)

    def choose(self, moment: Moment, history: History, obstacle: str) -> tuple[Choice, str]:
        """What to do at this step, and why it must be computed although the schedule would leave it out."""
        choice = self._schedule.at(moment.step, moment.steps)
        if choice == "reuse" and not history.snapshots:
            obstacle = obstacle or "nothing was kept"
        return ("compute", obstacle) if obstacle and choice != "compute" else (choice, "")

    def remember(self, history: History, moment: Moment, conditional: Leaves, unconditional: Leaves) -> None:
        """Keep the difference of two computed outputs."""
        if self._schedule.interval == 1:
            return
        difference = [one - other for one, other in zip(conditional, unconditional, strict=True)]
        history.add(Snapshot(moment, difference))
        self._statistics.most_bytes = max(self._statistics.most_bytes, history.bytes)
        if moment.last:
            history.forget()

    def stand_in(self, choice: Choice, history: History, moment: Moment, given: Given, conditional: Leaves) -> Leaves:
        """The unconditional output when it is not computed; where guidance is off, that is the conditional one."""
        if choice == "off":
            return [leaf.clone() for leaf in conditional]
        difference = self._guess.guess(history.snapshots, moment, given)
        return [leaf - part for leaf, part in zip(conditional, difference, strict=True)]

    def count(self, moment: Moment, branch: str, *, full: bool, reason: str = "") -> None:
        """Count one half of a guided step."""
        at = Moment(moment.request, moment.step, branch, moment.steps)
        self._statistics.record(self.denoiser.name, at, full=full, reason=reason)
