"""Policies that reuse while something changed little: the front's residual against that of the last computed step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from hasten.cache.engine.change import OverBatch, Reading, group_of, over_batch, relative_change
from hasten.cache.engine.policy import Policy, Signal
from hasten.cache.engine.site import Value
from hasten.core.clock import Moment
from hasten.core.target import Denoiser


class ChangeOfFront(Policy):
    """Reuse while the front's residual is within `threshold` of the one at the last computed step.

    Source: ParaAttention's First Block Cache (2024) and cache-dit's DBCache (2025). With `late=True` a step is decided
    by the change measured in the step before, carried on at its mean rate per step: that number has reached the host
    by then, so nothing waits for the GPU. While the rate is even, late decisions are those that waiting would give.
    """

    looks_at: Signal = "front"

    def __init__(self, denoiser: Denoiser, threshold: float, *, how: OverBatch = "max", late: bool = False) -> None:
        self._threshold, self._late = threshold, late
        self._how: OverBatch = how
        self._group = group_of(denoiser.module)
        self._anchor: torch.Tensor | None = None
        self._latest: torch.Tensor | None = None
        self._reading: Reading | None = None
        self._span = 1
        self._anchored_at = -1

    def decide(self, moment: Moment) -> bool | None:
        """Known beforehand only for a threshold of 0, or when the step before decides."""
        if self._threshold <= 0:
            return True
        if not self._late:
            return None
        return self._reading is None or not self._expected(self._reading, moment) < self._threshold

    def _expected(self, reading: Reading, moment: Moment) -> float:
        """The change from the last computed step to `moment`, if it goes on as it went until the step before."""
        return reading.value() / self._span * (moment.step - self._anchored_at)

    def observe(self, moment: Moment, signal: torch.Tensor) -> bool:
        """Compute unless the change since the last computed step is below the threshold; NaN computes."""
        self._latest, anchor = signal, self._anchor
        if anchor is None or anchor.shape != signal.shape or self._threshold <= 0:
            self._reading = None
            return True
        change = over_batch(relative_change(signal, anchor, self._group), self._how)
        if not self._late:
            return not float(change.item()) < self._threshold
        self._reading, self._span = Reading(change), max(1, moment.step - self._anchored_at)
        return False

    def computed(self, moment: Moment, kept: Value | None, guessed: Callable[[], Value | None]) -> None:
        """The residual just seen becomes the anchor."""
        self._anchor, self._anchored_at = self._latest, moment.step
