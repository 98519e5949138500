"""The clock: request, step and guidance branch of each denoiser call, known on the host without waiting for a GPU.

It watches the scheduler object (`set_timesteps` begins a request, `step` ends a step); a pipeline's
`cache_context` names the branch. Where no scheduler is observed, the timestep argument stands in, at the price of
reading it. Never the parity of calls. Anything unexpected begins a new request, so that caches compute.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from hasten.core.patch import Patch
    from hasten.core.target import Denoiser, Target


MOST_CALLS = 16
"""Calls of one denoiser in one step; beyond, the scheduler is taken not to be the one that is stepped."""


@dataclass(frozen=True)
class Moment:
    """When a denoiser call happens. `steps` and `sigma` are None where no scheduler was observed."""

    request: int
    step: int
    branch: str
    steps: int | None = None
    sigma: float | None = None

    @property
    def first(self) -> bool:
        """Is this the first step of its request?"""
        return self.step == 0

    @property
    def last(self) -> bool:
        """Is this known to be the last step of its request?"""
        return self.steps is not None and self.step >= self.steps - 1


class Clock:
    """Keeps the current `Moment`; one per session, shared by its techniques."""

    def __init__(self) -> None:
        self.now = Moment(0, 0, "")
        self._scheduler: object | None = None
        self._watched: list[object] = []
        self._schedule: _Schedule | None = None
        self._fallback = _TimestepReader()
        self._request, self._step = 0, 0
        self._calls: Counter[tuple[str, str]] = Counter()
        self._seen: dict[str, float] = {}
        self._context = ""

    def install(self, target: Target, patch: Patch) -> None:
        """Observe the target's scheduler and denoisers."""
        if target.scheduler is not None:
            self._watch(target.scheduler, patch)
        for denoiser in target.denoisers:
            patch.outermost(denoiser.module, self._on_call(denoiser, target, patch), "clock")
            if hasattr(denoiser.module, "cache_context"):
                patch.outermost(denoiser.module, self._on_context, "clock", method="cache_context")

    def _watch(self, scheduler: object, patch: Patch) -> None:
        self._scheduler = scheduler
        if _can_be_watched(scheduler) and not any(scheduler is known for known in self._watched):
            self._watched.append(scheduler)
            patch.outermost(scheduler, self._on_set_timesteps(scheduler), "clock", method="set_timesteps")
            patch.outermost(scheduler, self._on_step(scheduler), "clock", method="step")

    def _follow(self, target: Target, patch: Patch) -> None:
        """A pipeline may be given another scheduler at any time: watch that one from now on."""
        scheduler = getattr(target.pipeline, "scheduler", None)
        if scheduler is not None and scheduler is not self._scheduler:
            self._watch(scheduler, patch)
            self._begin(_Schedule(scheduler) if _can_be_watched(scheduler) else None)
            self._fallback = _TimestepReader()

    def _on_set_timesteps(self, scheduler: object) -> Callable[..., Any]:
        def observe(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if scheduler is self._scheduler:
                self._begin(_Schedule(scheduler))
            return result

        return observe

    def _on_step(self, scheduler: object) -> Callable[..., Any]:
        def observe(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if scheduler is self._scheduler:
                self._step += 1
                self._calls.clear()
                self._seen.clear()
            return result

        return observe

    @contextmanager
    def _on_context(self, call: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Generator[Any]:
        before, self._context = self._context, name
        try:
            with call(name, *args, **kwargs) as value:
                yield value
        finally:
            self._context = before

    def _on_call(self, denoiser: Denoiser, target: Target, patch: Patch) -> Callable[..., Any]:
        read = _argument_reader(denoiser)

        def observe(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._follow(target, patch)
            self.now = self._advance(denoiser.name, read(args, kwargs))
            return call(*args, **kwargs)

        return observe

    def _begin(self, schedule: _Schedule | None) -> None:
        self._request += 1
        self._step = 0
        self._schedule = schedule
        self._calls.clear()
        self._seen.clear()

    def _advance(self, name: str, timestep: Any) -> Moment:
        if self._schedule is not None and not self._still_observed(name, timestep):
            self._begin(None)
            self._fallback = _TimestepReader()
        if self._schedule is None:
            return self._advance_by_timestep(name, timestep)
        self._calls[name, self._context] += 1
        branch = self._branch(self._calls[name, self._context])
        moment = Moment(self._request, self._step, branch, self._schedule.steps)
        return replace(moment, sigma=self._schedule.sigma(self._step))

    def _still_observed(self, name: str, timestep: Any) -> bool:
        """Has the observed scheduler been stepped between calls with different timesteps?"""
        schedule = cast(_Schedule, self._schedule)
        if self._step >= schedule.steps or self._calls[name, self._context] >= MOST_CALLS:
            return False
        return _on_gpu(timestep) or self._seen.setdefault(name, _host(timestep)) == _host(timestep)

    def _advance_by_timestep(self, name: str, timestep: Any) -> Moment:
        began, self._step, ordinal = self._fallback.read(f"{name} {self._context}", _host(timestep))
        if began:
            self._request += 1
        return Moment(self._request, self._step, self._branch(ordinal + 1))

    def _branch(self, count: int) -> str:
        """Several calls in one context of one step are different calls: none may reuse another's results."""
        if not self._context:
            return f"call {count}"
        return self._context if count == 1 else f"{self._context}, call {count}"


class _Schedule:
    """Steps and noise levels of one request, copied to the host when the request begins."""

    def __init__(self, scheduler: object) -> None:
        self._scheduler = scheduler
        timesteps = getattr(scheduler, "timesteps", None)
        self._length = 0 if timesteps is None else len(timesteps)
        sigmas = getattr(scheduler, "sigmas", None)
        self._sigmas = tuple(sigmas.tolist()) if isinstance(sigmas, torch.Tensor) and sigmas.dim() == 1 else ()

    @property
    def _begin(self) -> int:
        # Image-to-image pipelines enter the schedule late, and say so after `set_timesteps`.
        return getattr(self._scheduler, "begin_index", None) or 0

    @property
    def steps(self) -> int:
        return max(self._length - self._begin, 0)

    def sigma(self, step: int) -> float | None:
        index = step + self._begin
        return self._sigmas[index] if index < len(self._sigmas) else None


class _TimestepReader:
    """Infers requests, steps and branches from timestep values alone.

    Limit: two successive requests of a single step with equal timesteps look like two branches of one step, up to
    `MOST_BRANCHES` calls; the first value of a request coming back begins a new request.
    """

    MOST_BRANCHES = 4

    def __init__(self) -> None:
        self._values: list[float] = []
        self._ordinals: dict[str, int] = {}

    def read(self, name: str, value: float) -> tuple[bool, int, int]:
        """Return (did a request begin, step, ordinal of the call within its step)."""
        repeated = bool(self._values) and value == self._values[-1]
        began = not self._values or (not repeated and self._turned(value)) or self._crowded(name, repeated)
        if began:
            self._values = [value]
            self._ordinals = {}
        elif not repeated:
            self._values.append(value)
            self._ordinals = {}
        self._ordinals[name] = self._ordinals.get(name, -1) + 1
        return began, len(self._values) - 1, self._ordinals[name]

    def _turned(self, value: float) -> bool:
        if len(self._values) < 2:
            return False
        return (value - self._values[-1]) * (self._values[-1] - self._values[0]) < 0

    def _crowded(self, name: str, repeated: bool) -> bool:
        return repeated and self._ordinals.get(name, -1) + 1 >= self.MOST_BRANCHES


def _argument_reader(denoiser: Denoiser) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Return the function that finds the timestep among a call's arguments."""
    name = denoiser.spec.timestep
    parameters = list(inspect.signature(denoiser.module.forward).parameters)
    position = parameters.index(name) if name in parameters else None

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs or position is None:
            return kwargs.get(name)
        return args[position] if position < len(args) else None

    return read


def _can_be_watched(scheduler: object) -> bool:
    return all(callable(getattr(scheduler, method, None)) for method in ("set_timesteps", "step"))


def _on_gpu(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def _host(value: Any) -> float:
    """The timestep as a number; of a batch, the first."""
    return float(value.flatten()[0].item()) if isinstance(value, torch.Tensor) else float(value or 0.0)
