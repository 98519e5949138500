"""A policy that spends steps by the error of its own forecasts, which every computed step tells for free.

Source: the embedded error estimates and PI control of adaptive integrators (Hairer, Norsett and Wanner 1993, II.4).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch

from hasten.cache.engine.policy import Policy
from hasten.cache.engine.site import Value
from hasten.cache.engine.values import tensors
from hasten.core.clock import Clock, Moment

TREND = 0.5
"""How much of the change of the estimate from one computed step to the next is expected once more."""
MOST_GAP = 8
"""Largest distance between computed steps."""


class ErrorControl(Policy):
    """Computes when the error of the state since the last computed step is expected to exceed `tolerance`.

    A forecast along a line through outputs a distance g apart errs h steps later by c*h*(h+g), with c half the second
    derivative. Each computed step measures c: |output - forecast| / |output|, for the sample of a batch with the
    largest. The error of the state after a gap is the sum of those of its steps, each times its change of flow time;
    `tolerance` is a share of the distance between noise and picture. One number is read a computed step. Two outputs
    are needed for a line and a third for its error, so that the first three steps are computed.
    """

    def __init__(
        self, tolerance: float, clock: Clock, planned: Callable[[int, int | None], bool] | None = None
    ) -> None:
        """`planned(step, steps)` are steps that are computed in any case; the control then only adds to them."""
        self._tolerance, self._clock, self._planned = tolerance, clock, planned
        self._latest: int | None = None
        self._spacing = 0
        self._curvature: float | None = None
        self._next = 0

    def decide(self, moment: Moment) -> bool:
        """Compute what is planned, and where the tolerance would be exceeded."""
        planned = self._planned is not None and self._planned(moment.step, moment.steps)
        return planned or moment.step >= self._next

    def computed(self, moment: Moment, kept: Value | None, guessed: Callable[[], Value | None]) -> None:
        """Measure what the forecast would have been, and set the next step that must be computed."""
        ahead = 0 if self._latest is None else moment.step - self._latest
        forecast = guessed() if self._spacing and ahead else None
        if kept is not None and forecast is not None:
            self._learn(relative_error(kept, forecast) / (ahead * (ahead + self._spacing)))
        self._latest, self._spacing = moment.step, ahead
        self._next = moment.step + self._gap(moment.step)

    def _learn(self, measured: float) -> None:
        before = self._curvature
        trend = (measured / before) ** TREND if before and measured else 1.0
        self._curvature = measured * min(max(trend, 0.5), 2.0)

    def _gap(self, step: int) -> int:
        """The largest gap whose error stays within the tolerance; before anything is known 1, or what is planned."""
        if self._curvature is None:
            return 1 if self._planned is None else MOST_GAP
        error, moves = 0.0, self._moves(step)
        for gap in range(1, MOST_GAP):
            move = moves[gap] if gap < len(moves) else 0.0
            error += self._curvature * gap * (gap + self._spacing) * move
            if not error <= self._tolerance:
                return gap
        return MOST_GAP

    def _moves(self, step: int) -> list[float]:
        """The change of flow time in this step and in those that follow."""
        facts = self._clock.facts
        times = [level.flow_time for level in facts.levels[step:]] if facts is not None else []
        return [abs(there - here) for here, there in itertools.pairwise(times)]


def relative_error(kept: Value, forecast: Value) -> float:
    """|kept - forecast| / |kept| over everything but the batch, the largest of the batch; read from the device."""
    pairs = zip(tensors(kept), tensors(forecast), strict=True)
    return float(torch.stack([_squares(one, other) for one, other in pairs]).max().sqrt().item())


def _squares(value: torch.Tensor, guess: torch.Tensor) -> torch.Tensor:
    wrong = (value.float() - guess.float()).flatten(1).square().sum(1)
    return (wrong / value.float().flatten(1).square().sum(1).clamp_min(1e-12)).max()
