"""A guess along the straight line through the two latest computed values."""

from __future__ import annotations

from collections.abc import Sequence

from hasten.cache.engine.guess import Hold
from hasten.core.clock import Moment


class Linear(Hold):
    """Extrapolates over the real distance in steps; holds the value while there is only one.

    Source: SeaCache's residual order 1 (arXiv:2602.18993): r_b + (r_b - r_a) * (t - b) / (b - a).
    """

    snapshots = 2
    smooth = True

    def weights(self, moments: Sequence[Moment], at: Moment) -> tuple[float, ...]:
        """Weights of the latest two values."""
        if len(moments) < 2 or moments[-1].step == moments[-2].step:
            return super().weights(moments, at)
        ahead = (at.step - moments[-1].step) / (moments[-1].step - moments[-2].step)
        return (*(0.0,) * (len(moments) - 2), -ahead, 1.0 + ahead)
