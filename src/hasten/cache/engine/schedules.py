"""Fixed schedules beyond every n-th step."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np


def non_uniform(interval: int, center: int, power: float) -> Callable[[int, int | None], bool]:
    """As many computed steps as every `interval`-th, but denser around step `center`; see `quadratic_steps`.

    Without a known number of steps, or where no such schedule exists, every `interval`-th step.
    """

    def computes(step: int, steps: int | None) -> bool:
        found = None if steps is None else quadratic_steps(steps, -(-steps // interval), center, power)
        return step % interval == 0 if found is None else step in found

    return computes


@functools.cache
def quadratic_steps(steps: int, count: int, center: int, power: float) -> frozenset[int] | None:
    """Choose `count` of `steps` steps, 0 among them, denser around `center` the larger the power.

    Source: DeepCache (arXiv:2312.00858, section 3.4) with the arithmetic of its published scripts: l runs evenly from
    (-center)^(1/power) to (steps - center)^(1/power) in count + 1 points, and the steps are int(l^power) + center.
    Roots of negative numbers are the principal complex ones, of which the real part counts. While two points fall
    on one step the power is lowered by 0.02; None when it reaches 1.
    """
    while power > 1:
        ends = complex(-center) ** (1 / power), complex(steps - center) ** (1 / power)
        points = np.linspace(*ends, count + 1) ** power
        inner = np.unique(points.real.astype(np.int32))[1:-1] + center
        if len(inner) == count - 1:
            return frozenset((0, *(int(step) for step in inner)))
        power -= 0.02
    return frozenset({0}) if count == 1 else None
