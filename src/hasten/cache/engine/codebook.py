"""A policy that looks up, after each computed step, how long to reuse: from how much a middle block has changed."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils._pytree import tree_leaves

from hasten.cache.engine.change import Reading, over_batch, relative_change, sampled
from hasten.cache.engine.policy import Policy
from hasten.cache.engine.site import Value
from hasten.core.clock import Moment

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Rates = tuple[tuple[float, ...], ...]
"""Pairs (change, rate) in rising order: below that change, the next step to compute comes `rate` steps later."""

_USUAL_MOTION, _POWER, _GRADIENT = 0.385, 8, 10
"""Constants of motion regularization in AdaCache's code."""


@dataclass(frozen=True)
class Codebook:
    """Rates, and between which shares of the steps motion is regarded."""

    rates: Rates
    motion: tuple[float, float] = (0.1, 0.9)

    def rate(self, change: float) -> int:
        """How many steps further to compute next; the last rate for any larger change, 1 when it is no number."""
        if math.isnan(change) or not self.rates:
            return 1
        return int(next((rate for limit, rate in self.rates if change < limit), self.rates[-1][1]))

    def stretched(self, factor: float) -> Codebook:
        """The same rates for changes that are larger by this factor."""
        return replace(self, rates=tuple((limit * factor, rate) for limit, rate in self.rates))

    def regards_motion(self, moment: Moment) -> bool:
        """Is this one of the steps in which motion counts? Where no scheduler is observed, all are."""
        if moment.steps is None:
            return True
        first, last = self.motion
        return first <= (moment.step + 1) / moment.steps <= last


@cache
def published(name: str) -> Codebook:
    """A published codebook by name."""
    text = resources.files("hasten").joinpath("data", "adacache.json").read_text("utf-8")
    found: dict[str, Any] = json.loads(text)["codebooks"][name]
    first, last = (step / found["steps"] for step in found["motion"])
    return Codebook(tuple((float(limit), int(rate)) for limit, rate in found["rates"]), (first, last))


def motion(tokens: torch.Tensor, frames: int) -> torch.Tensor:
    """The L1 difference of successive frames over the sum of their sizes; `tokens` [B, frames*N, C], frame by frame."""
    by_frame = tokens.unflatten(1, (frames, -1)).float()
    earlier, later = by_frame[:, :-1], by_frame[:, 1:]
    return (later - earlier).abs().sum() / (later.abs().sum() + earlier.abs().sum()).clamp_min(1e-12)


class LookedUp(Policy):
    """Computes when the rate that the latest computed step was given has passed; AdaCache's policy.

    The change is the relative L1 distance of what the site keeps at `place` from what it kept at the computed step
    before, divided by the number of steps between, for the sample of a batch that changed most. With
    `frames_per_token` it is multiplied by how much the frames of a video differ and by how that changes.
    """

    def __init__(
        self,
        codebook: Codebook,
        place: int,
        *,
        warm_up: int,
        cool_down: int,
        group: ProcessGroup | None = None,
        frames_per_token: int = 0,
    ) -> None:
        self._codebook, self._place, self._group = codebook, place, group
        self._warm_up, self._cool_down = warm_up, cool_down
        self._frames_per_token, self._frames = frames_per_token, 0
        if frames_per_token:
            self.looks_at = "input"
        self._at, self._due = 0, 0
        self._anchor: torch.Tensor | None = None
        self._motion: torch.Tensor | float = 1.0
        self._reading: Reading | None = None

    def decide(self, moment: Moment) -> bool | None:
        """Compute in the first and last steps, and when the rate has passed."""
        if self._reading is not None:
            self._due, self._reading = self._at + self._codebook.rate(self._reading.value()), None
        last = moment.steps is not None and moment.step >= moment.steps - self._cool_down
        return last or moment.step < self._warm_up or moment.step >= self._due

    def observe(self, moment: Moment, signal: torch.Tensor) -> bool:
        """Only the number of frames is wanted, of latents [B, C, frames, H, W]."""
        self._frames = signal.shape[2] // self._frames_per_token if signal.dim() == 5 else 0
        return True

    def computed(self, moment: Moment, kept: Value | None, guessed: Callable[[], Value | None]) -> None:
        """Compare with the computed step before; the number is read when the next step asks."""
        value = None if kept is None else cast("torch.Tensor", tree_leaves(kept[self._place])[0])
        gap, anchor = moment.step - self._at, self._anchor
        self._at, self._due = moment.step, moment.step + 1
        self._anchor = None if value is None else sampled(value)
        if value is None or self._anchor is None or anchor is None or anchor.shape != self._anchor.shape or gap < 1:
            return
        change = over_batch(relative_change(self._anchor, anchor, self._group), "max") / gap
        self._reading = Reading(change * self._regularization(value, moment, gap))

    def _regularization(self, tokens: torch.Tensor, moment: Moment, gap: int) -> torch.Tensor | float:
        if self._frames < 2:
            return 1.0
        before, self._motion = self._motion, 1.0
        if self._codebook.regards_motion(moment):
            self._motion = (motion(tokens, self._frames) / _USUAL_MOTION) ** _POWER
        return self._motion + abs(_GRADIENT * (self._motion - before) / gap)
