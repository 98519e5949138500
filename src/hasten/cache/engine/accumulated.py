"""Policies that add up how much something changed from step to step, and compute once the sum is too large."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from hasten.cache.engine.change import relative_change, sampled
from hasten.cache.engine.policy import Policy, Signal
from hasten.cache.engine.site import Value
from hasten.core.clock import Moment

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

See = Callable[[Moment, torch.Tensor], torch.Tensor | None]
"""What of a signal is compared; None when it cannot be told at this moment."""


class AccumulatedChange(Policy):
    """Reuse while the changes since the last computed step add up to less than `threshold`.

    Each step is compared with the step before, computed or not: the relative L1 distance, turned by `rate` into what
    is added. Every sample of a batch has a sum of its own, and the largest decides. Source: TeaCache
    (arXiv:2411.19108), equation 5. NaN and changes of size compute.
    """

    def __init__(
        self,
        threshold: float,
        *,
        looks_at: Signal,
        rate: Callable[[float], float] = float,
        see: See | None = None,
        group: ProcessGroup | None = None,
        unseen: str = "",
    ) -> None:
        """`unseen` says in the statistics why, when `see` returns None."""
        self.looks_at = looks_at
        self._threshold, self._rate, self._see, self._group = threshold, rate, see, group
        self._unseen, self._trouble = unseen, ""
        self._before: torch.Tensor | None = None
        self._sums: list[float] = []

    @property
    def trouble(self) -> str:
        """Why the latest step could not be compared."""
        return self._trouble

    def decide(self, moment: Moment) -> bool | None:
        """Known beforehand only for a threshold of 0."""
        return True if self._threshold <= 0 else None

    def observe(self, moment: Moment, signal: torch.Tensor) -> bool:
        """Compute unless the sums, this step's change included, are below the threshold."""
        seen = signal if self._see is None else self._see(moment, signal)
        self._trouble = self._unseen if seen is None else ""
        before, self._before = self._before, None if seen is None else sampled(seen)
        if self._threshold <= 0 or before is None or self._before is None or before.shape != self._before.shape:
            return True
        changes: list[float] = relative_change(self._before, before, self._group).tolist()
        earlier = self._sums or [0.0] * len(changes)
        self._sums = [total + self._rate(change) for total, change in zip(earlier, changes, strict=True)]
        return not all(total < self._threshold for total in self._sums)

    def computed(self, moment: Moment, kept: Value | None, guessed: Callable[[], Value | None]) -> None:
        """Begin anew."""
        self._sums = []
