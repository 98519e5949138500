"""Landing gains: how much of an error in the state at a node arrives in the final sample, from perturbed runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from hasten.cache.engine.records import Grid
from hasten.core.errors import InvalidSetting


def landing_gain(plain: torch.Tensor, perturbed: torch.Tensor, kick: torch.Tensor) -> float:
    """|perturbed - plain| / |kick| for final samples and the `kick` added to the state xh; raises for a zero kick.

    All three in the coordinates xh = x/(alpha+sigma). The kick should look like a forecast error (the difference
    of two outputs serves), be small against the state, and large against rounding.
    """
    size = float(kick.double().norm())
    if not size > 0:
        raise InvalidSetting("A landing gain needs a perturbation that is not zero.")
    return float((perturbed.double() - plain.double()).norm()) / size


def interpolated_gains(grid: Grid, measured: Mapping[int, Sequence[float]]) -> tuple[float, ...]:
    """Gains at all nodes from those measured at some, several seeds each: root mean square, linear in flow time.

    Constant beyond the outermost measured nodes, except that an error at the last node, the final sample, counts 1.
    Seven nodes with two seeds serve as well as all nodes (measured on small nets).
    """
    wrong = [node for node in measured if not 0 <= node <= grid.steps]
    if wrong or not measured or not all(measured.values()):
        raise InvalidSetting(f"Gains need values at nodes from 0 to {grid.steps}, not at {sorted(measured)}.")
    known = {grid.steps: [1.0], **measured}
    nodes = sorted(known, reverse=True)
    values = [float(np.sqrt(np.mean(np.square(known[node])))) for node in nodes]
    s = grid.flow_time
    return tuple(np.interp(s, [s[node] for node in nodes], values).tolist())
