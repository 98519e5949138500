"""Means with 95 % confidence intervals, by resampling the prompts: pairs stay together, the seed is fixed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 4000
CAP = 80.0
"""PSNR in dB that identical pictures (infinitely many) count as, so that means exist."""


@dataclass(frozen=True)
class Estimate:
    """A mean and the interval that holds it in 95 of 100 such experiments."""

    mean: float
    low: float
    high: float

    def text(self, digits: int) -> str:
        """`31.2 ± 0.8`, the larger of the two half-widths."""
        half = max(self.high - self.mean, self.mean - self.low)
        return f"{self.mean:.{digits}f} ± {half:.{digits}f}"


def estimate(values: Sequence[float | None]) -> Estimate:
    """The mean of one number a prompt; None (identical pictures) counts as `CAP`."""
    array = np.array([CAP if value is None else min(value, CAP) for value in values], dtype=np.float64)
    places = np.random.default_rng(0).integers(0, len(array), size=(RESAMPLES, len(array)))
    means = array[places].mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return Estimate(float(array.mean()), float(low), float(high))


def difference(left: Sequence[float | None], right: Sequence[float | None]) -> Estimate:
    """The mean of left - right, prompt by prompt."""
    pairs = zip(left, right, strict=True)
    return estimate([(CAP if a is None else min(a, CAP)) - (CAP if b is None else min(b, CAP)) for a, b in pairs])
