"""When to compute: policies are made anew for each denoiser and request, and decide once for all its branches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from hasten.cache.engine.site import Value
from hasten.core.clock import Moment

Signal = Literal["nothing", "input", "front"]
"""What a policy looks at: the schedule alone, the call's noisy picture, or the change made by the first blocks."""


class Policy:
    """Decides between computing and reusing. The base class computes always.

    In each step `decide` is asked first, then, for a policy that looks at something, `observe`; then exactly one
    of `computed` and `reused` tells what really happened, which may differ: the runner computes whenever nothing
    fits, whatever the policy says.
    """

    looks_at: Signal = "nothing"

    @property
    def trouble(self) -> str:
        """What kept it from deciding at the latest step, so that it computes; empty when nothing did."""
        return ""

    def decide(self, moment: Moment) -> bool | None:
        """Compute? None leaves it to `observe`."""
        return True

    def observe(self, moment: Moment, signal: torch.Tensor) -> bool:
        """Compute, given what the policy looks at? Called at every step, also when `decide` has decided."""
        return True

    def computed(self, moment: Moment, kept: Value | None, guessed: Callable[[], Value | None]) -> None:
        """The step was computed and the site kept `kept`; `guessed()` is what would have stood in for it."""

    def reused(self, moment: Moment) -> None:
        """The step reused earlier results."""

    def share(self, steps: int) -> float | None:
        """The share of steps that are computed in a request of so many steps; None when only a run can tell."""
        return None


class Fixed(Policy):
    """Follows a schedule that is known beforehand: no tensor work and nothing to wait for."""

    def __init__(self, computes: Callable[[int, int | None], bool], *, own_start: bool = False) -> None:
        """`computes(step, steps)`; `steps` is None where no scheduler is observed.

        With `own_start`, steps are counted from the first in which this denoiser takes part: of two experts, the
        second begins its own warm-up.
        """
        self._computes = computes
        self._start = None if own_start else 0

    def decide(self, moment: Moment) -> bool:
        """As scheduled."""
        if self._start is None:
            self._start = moment.step
        return self._computes(moment.step - self._start, moment.steps and moment.steps - self._start)

    def share(self, steps: int) -> float:
        """Counted from the schedule; the first step is always computed."""
        return sum(step == 0 or self._computes(step, steps) for step in range(steps)) / steps


def every(interval: int) -> Fixed:
    """Compute at every `interval`-th step, beginning with the first."""
    return Fixed(lambda step, steps: step % interval == 0)


class Guarded(Policy):
    """A policy within limits: computed first steps, a longest run of reuse, a mask, a computed last step."""

    def __init__(
        self,
        inner: Policy,
        *,
        warm_up: int = 0,
        most_reused: int | None = None,
        compute_last: bool = False,
        mask: Callable[[int, int | None], bool] | None = None,
    ) -> None:
        """`mask(step, steps)` says where computing is compulsory."""
        self._inner, self.looks_at = inner, inner.looks_at
        self._warm_up, self._most, self._last = warm_up, most_reused, compute_last
        self._mask = mask
        self._run = 0

    @property
    def trouble(self) -> str:
        """That of the inner policy."""
        return self._inner.trouble

    def decide(self, moment: Moment) -> bool | None:
        """Compute where a limit demands it; otherwise as the inner policy says."""
        decided = self._inner.decide(moment)
        return True if self._must(moment) else decided

    def _must(self, moment: Moment) -> bool:
        return (
            moment.step < self._warm_up
            or (self._most is not None and self._run >= self._most)
            or (self._last and moment.last)
            or (self._mask is not None and self._mask(moment.step, moment.steps))
        )

    def observe(self, moment: Moment, signal: torch.Tensor) -> bool:
        """As the inner policy says."""
        return self._inner.observe(moment, signal)

    def computed(self, moment: Moment, kept: Value | None, guessed: Callable[[], Value | None]) -> None:
        """The run of reuse ends."""
        self._run = 0
        self._inner.computed(moment, kept, guessed)

    def reused(self, moment: Moment) -> None:
        """The run of reuse grows."""
        self._run += 1
        self._inner.reused(moment)

    def share(self, steps: int) -> float | None:
        """Only a schedule without a longest run can be counted beforehand."""
        if self._inner.share(steps) is None or self._most is not None:
            return None
        moments = [Moment(0, step, "", steps) for step in range(steps)]
        return sum(moment.first or bool(self.decide(moment)) for moment in moments) / steps
