"""How to guess a value that is not computed, from the latest computed ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hasten.cache.engine.history import Snapshot
from hasten.cache.engine.site import Value
from hasten.cache.engine.values import combine
from hasten.core.clock import Moment


class Hold:
    """The latest computed value, as it is. Base of all guesses, which differ in their weights."""

    snapshots: int = 1
    """How many computed values are kept."""
    smooth: bool = False
    """Does it assume that values move smoothly? Then a sampler that adds noise at every step makes it useless."""

    def obstacle(self, moment: Moment) -> str:
        """Why nothing can be guessed at this moment; empty when it can."""
        return ""

    def weights(self, moments: Sequence[Moment], at: Moment) -> tuple[float, ...]:
        """Weights of the kept values (computed at `moments`, newest last) in the guess for `at`."""
        return (*(0.0,) * (len(moments) - 1), 1.0)

    def guess(self, kept: Sequence[Snapshot], at: Moment, given: Mapping[str, Any]) -> Value:
        """What stands in for computing at `at` in a call with the arguments `given`."""
        weights = self.weights([snapshot.moment for snapshot in kept], at)
        used = [(weight, snapshot.value) for weight, snapshot in zip(weights, kept, strict=True) if weight]
        return combine([weight for weight, _ in used], [value for _, value in used])

    def encode(self, value: Value, at: Moment, given: Mapping[str, Any]) -> Value:
        """What is remembered of a computed value; guesses made in another quantity convert it."""
        return value
