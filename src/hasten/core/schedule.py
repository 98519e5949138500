"""The schedule of one request: its steps and noise levels, copied to the host when the request begins."""

from __future__ import annotations

import math
from typing import Any

import torch

from hasten.core.noise import NoiseLevel
from hasten.core.sampler import SamplerFacts, sampler_facts
from hasten.core.timesteps import position


class Schedule:
    """What the scheduler has set up by `set_timesteps`, counted from where the pipeline enters it.

    Image-to-image pipelines leave out the first steps. They say so after `set_timesteps` by `set_begin_index`; with a
    scheduler that has no such method, the first denoiser call shows it.
    """

    def __init__(self, scheduler: object) -> None:
        self._scheduler = scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        self._timesteps = timesteps if isinstance(timesteps, torch.Tensor) and timesteps.dim() == 1 else None
        self._first = math.nan if self._timesteps is None or not len(self._timesteps) else float(self._timesteps[0])
        self._length = 0 if timesteps is None else len(timesteps)
        sigmas = getattr(scheduler, "sigmas", None)
        self._sigmas = tuple(sigmas.tolist()) if isinstance(sigmas, torch.Tensor) and sigmas.dim() == 1 else ()
        self._whole = sampler_facts(scheduler, begin=0)
        self._part: tuple[int, SamplerFacts | None] = (0, self._whole)
        self._entered: int | None = None

    def enter(self, timestep: Any) -> None:
        """Note where the request begins, from the timestep of its first denoiser call."""
        if self._entered is None:
            self._entered = self._find(timestep)

    def _find(self, timestep: Any) -> int:
        index = getattr(self._scheduler, "step_index", None)
        if index is None and self._timesteps is not None:
            index = position(self._timesteps, self._first, timestep)
        if index is None and not hasattr(self._scheduler, "begin_index"):
            self._part = (0, None)
        return index or 0

    @property
    def _begin(self) -> int:
        declared = getattr(self._scheduler, "begin_index", None)
        return (self._entered or 0) if declared is None else declared

    @property
    def steps(self) -> int:
        """Number of steps of the request."""
        return max(self._length - self._begin, 0)

    @property
    def facts(self) -> SamplerFacts | None:
        """What is known about the sampler in this request."""
        if self._part[0] != self._begin:
            self._part = (self._begin, None if self._whole is None else self._whole.since(self._begin))
        return self._part[1]

    def level(self, step: int) -> NoiseLevel | None:
        """The noise level of the denoiser's input at a step."""
        facts = self.facts
        return facts.levels[step] if facts is not None and step < facts.steps else None

    def sigma(self, step: int) -> float | None:
        """The scheduler's own sigma at a step, or that of the noise level where it keeps none."""
        index, level = step + self._begin, self.level(step)
        if index < len(self._sigmas):
            return self._sigmas[index]
        return None if level is None else level.sigma


def can_be_watched(scheduler: object) -> bool:
    """Does this object set and take steps as a scheduler does?"""
    return all(callable(getattr(scheduler, method, None)) for method in ("set_timesteps", "step"))
