"""Watches uncached runs: changes of indicator and output from step to step, and magnitudes of residuals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from hasten.cache.engine.change import relative_change, sampled
from hasten.cache.engine.policy import Policy
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.runner import Runner
from hasten.cache.engine.site import Site, Value
from hasten.cache.engine.statistics import Statistics
from hasten.cache.mag_cache import MagCache
from hasten.cache.tea_cache import TeaCache
from hasten.core.clock import Moment
from hasten.core.patch import Patch
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about

Purpose = Literal["teacache", "magcache"]


@dataclass
class StepRecord:
    """One step of one picture, as the first guidance branch shows it, against the step before.

    Changes are relative L1 distances, one for each sample of the batch; `ratio` is the mean over positions of the
    residual's magnitude over the one before. None where there is nothing to compare with.
    """

    step: int
    indicator: list[float] | None = None
    output: list[float] | None = None
    ratio: float | None = None

    @property
    def pairs(self) -> list[tuple[float, float]]:
        """Change of the indicator and of the output, for each sample."""
        return list(zip(self.indicator or (), self.output or (), strict=False))


Request = list[StepRecord]
"""The steps of one picture, in order."""


@dataclass
class Records:
    """What a denoiser did, request by request."""

    requests: dict[int, Request] = field(default_factory=dict[int, Request])

    def at(self, moment: Moment) -> StepRecord:
        """The record of a moment's step, made when it is first asked for."""
        steps = self.requests.setdefault(moment.request, [])
        if not steps or steps[-1].step != moment.step:
            steps.append(StepRecord(moment.step))
        return steps[-1]


@dataclass(frozen=True, kw_only=True)
class Recording(Cache):
    """Computes everything, and notes what a cache would need to know. It is no technique for users."""

    purpose: Purpose = field(default="teacache", metadata=about("for which cache"))

    def problems(self, target: Target) -> list[str]:
        """What the cache's site needs; its numbers are what is being measured."""
        return list(_without_data(self.purpose).problems(target))

    def site(self, denoiser: Denoiser) -> Site:
        """That of the cache."""
        return _without_data(self.purpose).site(denoiser)

    def apply(self, target: Target, patch: Patch) -> None:
        """Watch every denoiser; two experts of one pipeline share the records of a picture."""
        patch.keep(Records())
        super().apply(target, patch)

    def install(self, denoiser: Denoiser, target: Target, patch: Patch, statistics: Statistics) -> None:
        """Put a runner that always computes around the denoiser, and note its output."""
        records = next(state for state in patch.states if isinstance(state, Records))
        watching = _Indicator if self.purpose == "teacache" else _Magnitude
        policy = watching(records, denoiser)
        runner = Runner(denoiser, self.site(denoiser), policy.anew, self.guess(), patch.clock, statistics)
        runner.install(patch, "is watched")
        if self.purpose == "teacache":
            patch.around(denoiser.module, _Outputs(records, lambda: patch.clock.now), "its output is noted")


def _without_data(purpose: Purpose) -> Cache:
    """The cache with numbers of no meaning, for what does not depend on them."""
    return TeaCache(coefficients=(1.0, 0.0)) if purpose == "teacache" else MagCache(ratios=(1.0,))


class _Watching(Policy):
    """Computes at every step, and compares it with the step before."""

    def __init__(self, records: Records, denoiser: Denoiser) -> None:
        self._records, self._denoiser = records, denoiser
        self._before: torch.Tensor | None = None

    def anew(self) -> Policy:
        """The policy of the next request."""
        return type(self)(self._records, self._denoiser)


class _Indicator(_Watching):
    looks_at = "front"

    def observe(self, moment: Moment, signal: torch.Tensor) -> bool:
        self._records.at(moment).indicator = _change(signal, self._before)
        self._before = signal
        return True


class _Magnitude(_Watching):
    def computed(self, moment: Moment, kept: Value | None, guessed: Callable[[], Value | None]) -> None:
        now = None if kept is None else _magnitude(kept, self._denoiser)
        record, before = self._records.at(moment), self._before
        if now is not None and before is not None and now.shape == before.shape:
            record.ratio = float((now / before.clamp_min(1e-8)).mean().item())
        self._before = now


def _magnitude(kept: Value, denoiser: Denoiser) -> torch.Tensor:
    """Euclidean norm of the residual at each position: [batch, tokens], or [batch, rows, columns] of a U-Net."""
    if denoiser.spec.unet is not None:
        return torch.linalg.vector_norm(kept.float(), dim=1)
    return torch.linalg.vector_norm(kept[denoiser.spec.stacks[0].denoised].float(), dim=-1)


class _Outputs:
    """Notes how the denoiser's output changes, in the guidance branch that comes first in a step."""

    def __init__(self, records: Records, now: Callable[[], Moment]) -> None:
        self._records, self._now = records, now
        self._before: tuple[int, torch.Tensor] | None = None
        self._latest = (-1, -1)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output, moment = call(*args, **kwargs), self._now()
        if (moment.request, moment.step) != self._latest:
            self._latest = (moment.request, moment.step)
            self._note(moment, sampled(_tensor(output)))
        return output

    def _note(self, moment: Moment, value: torch.Tensor) -> None:
        same = self._before is not None and self._before[0] == moment.request
        self._records.at(moment).output = _change(value, self._before[1] if same and self._before else None)
        self._before = (moment.request, value)


def _tensor(output: Any) -> torch.Tensor:
    """What a denoiser predicts, as one batch, from a tuple or an output object of diffusers."""
    value = output[0]
    return value if isinstance(value, torch.Tensor) else torch.stack(list(value))


def _change(value: torch.Tensor, before: torch.Tensor | None) -> list[float] | None:
    if before is None or before.shape != value.shape:
        return None
    return relative_change(value, before).tolist()
