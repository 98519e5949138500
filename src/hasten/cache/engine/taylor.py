"""The Taylor forecast in step index, as TaylorSeer and cache-dit's calibrator publish it."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.cache.engine.guess import Hold
from hasten.cache.engine.rules import taylor_weights
from hasten.core.clock import Moment


class Taylor(Hold):
    """Extrapolates the latest computed values over step indices; of order 0 it holds the latest.

    Source: TaylorSeer (arXiv:2503.06923). Differences are taken at steps from `begin` on; cache-dit begins with step
    index 2, because the first two steps of a request change too much to be carried on.
    """

    smooth = True

    def __init__(self, order: int, *, begin: int = 2) -> None:
        self.order, self.snapshots, self._begin = order, order + 1, begin

    def weights(self, moments: Sequence[Moment], at: Moment) -> tuple[float, ...]:
        """Weights of the kept values; those that a lower order does not use get 0."""
        steps = [moment.step for moment in moments]
        order = min(self.order, len(steps) - 1, _trailing([step >= self._begin for step in steps]))
        used = taylor_weights(steps, at.step, order)
        return (*(0.0,) * (len(steps) - len(used)), *used)


def _trailing(holds: Sequence[bool]) -> int:
    """How many of the last ones hold without a gap."""
    count = 0
    for value in reversed(holds):
        if not value:
            break
        count += 1
    return count


def hold_or_taylor(order: int, *, begin: int = 2) -> Hold:
    """The guess of this order."""
    return Taylor(order, begin=begin) if order else Hold()
