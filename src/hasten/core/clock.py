"""The clock: request, step and guidance branch of each denoiser call, known on the host without waiting for a GPU.

It watches the scheduler object (`set_timesteps` begins a request, `step` ends a step); a pipeline's
`cache_context` names the branch. Where no scheduler is observed, the timestep argument stands in, at the price of
reading it. Never the parity of calls. Anything unexpected begins a new request, so that caches compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from hasten.core.errors import PatchError
from hasten.core.intercept import Interceptor
from hasten.core.noise import NoiseLevel
from hasten.core.sampler import SamplerFacts, adds_noise
from hasten.core.schedule import Schedule, can_be_watched
from hasten.core.step_link import LEADING, StepLink
from hasten.core.timesteps import TimestepReader, argument_reader, on_gpu, on_host

if TYPE_CHECKING:
    from hasten.core.patch import Patch
    from hasten.core.target import Denoiser, Target


MOST_CALLS = 16
"""Calls of one denoiser in one step; beyond, the scheduler is taken not to be the one that is stepped."""


@dataclass(frozen=True)
class Moment:
    """When a denoiser call happens. `steps`, `sigma` and `level` are None where no scheduler was observed.

    `sigma` is the scheduler's own, in the scheduler's own convention; `level` describes the denoiser's input in the
    one of `core.noise`, and is None too where the scheduler is not known.
    """

    request: int
    step: int
    branch: str
    steps: int | None = None
    sigma: float | None = None
    level: NoiseLevel | None = None

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
        self._links: list[StepLink] = []
        self._schedule: Schedule | None = None
        self._fallback = TimestepReader()
        self._request, self._step = 0, 0
        self._added_noise = False
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

    @property
    def facts(self) -> SamplerFacts | None:
        """What is known about the sampler of the current request; settled by its first denoiser call."""
        return None if self._schedule is None else self._schedule.facts

    @property
    def noisy(self) -> bool:
        """Is the sampler known to add noise at each step? Where arguments of `step` decide, the latest step tells."""
        facts = self.facts
        return facts is not None and (self._added_noise if self._step else facts.stochastic)

    def around_step(self, link: Interceptor, patch: Patch, what: str = "takes part in each step") -> None:
        """Put `link(call, model_output, timestep, sample, *args, **kwargs)` around the scheduler's `step`.

        It is put around whichever scheduler the pipeline uses, also one that it is given later; a later link stands
        outside an earlier one, and all inside the clock, for which the step ends when `step` has returned. `patch`
        records it as `what` and takes it off. Raises PatchError where there is no scheduler to observe.
        """
        if not self._watched:
            raise PatchError("There is no scheduler whose steps can be observed; a whole pipeline has one.")
        entry = StepLink(link, lambda scheduler: scheduler is self._scheduler)
        self._links.append(entry)
        patch.undo(self._watched[-1], what, partial(self._drop, entry))
        for scheduler in self._watched:
            entry.put(scheduler)

    def _drop(self, entry: StepLink) -> None:
        entry.take_off()
        self._links.remove(entry)

    def _watch(self, scheduler: object, patch: Patch) -> None:
        self._scheduler = scheduler
        if can_be_watched(scheduler) and not any(scheduler is known for known in self._watched):
            self._watched.append(scheduler)
            patch.outermost(scheduler, self._on_set_timesteps(scheduler), "clock", method="set_timesteps")
            patch.outermost(scheduler, self._on_step(scheduler), "clock", method="step")
            for entry in self._links:
                entry.put(scheduler)

    def _follow(self, target: Target, patch: Patch) -> None:
        """A pipeline may be given another scheduler at any time: watch that one from now on."""
        scheduler = getattr(target.pipeline, "scheduler", None)
        if scheduler is not None and scheduler is not self._scheduler:
            self._watch(scheduler, patch)
            self._begin(Schedule(scheduler) if can_be_watched(scheduler) else None)
            self._fallback = TimestepReader()

    def _on_set_timesteps(self, scheduler: object) -> Callable[..., Any]:
        def observe(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if scheduler is self._scheduler:
                self._begin(Schedule(scheduler))
            return result

        return observe

    def _on_step(self, scheduler: object) -> Callable[..., Any]:
        def observe(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            result = call(*args, **kwargs)
            if scheduler is self._scheduler:
                self._step += 1
                self._added_noise = adds_noise(scheduler, kwargs, args[len(LEADING) :])
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
        read = argument_reader(denoiser)

        def observe(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            self._follow(target, patch)
            self.now = self._advance(denoiser.name, read(args, kwargs))
            return call(*args, **kwargs)

        return observe

    def _begin(self, schedule: Schedule | None) -> None:
        self._request += 1
        self._step = 0
        self._schedule = schedule
        self._added_noise = False
        self._calls.clear()
        self._seen.clear()

    def _advance(self, name: str, timestep: Any) -> Moment:
        if self._schedule is not None:
            self._schedule.enter(timestep)
        if self._schedule is not None and not self._still_observed(name, timestep):
            self._begin(None)
            self._fallback = TimestepReader()
        if self._schedule is None:
            return self._advance_by_timestep(name, timestep)
        self._calls[name, self._context] += 1
        branch = self._branch(self._calls[name, self._context])
        sigma, level = self._schedule.sigma(self._step), self._schedule.level(self._step)
        return Moment(self._request, self._step, branch, self._schedule.steps, sigma, level)

    def _still_observed(self, name: str, timestep: Any) -> bool:
        """Has the observed scheduler been stepped between calls with different timesteps?"""
        schedule = cast(Schedule, self._schedule)
        if self._step >= schedule.steps or self._calls[name, self._context] >= MOST_CALLS:
            return False
        return on_gpu(timestep) or self._seen.setdefault(name, on_host(timestep)) == on_host(timestep)

    def _advance_by_timestep(self, name: str, timestep: Any) -> Moment:
        began, self._step, ordinal = self._fallback.read(f"{name} {self._context}", on_host(timestep))
        if began:
            self._request += 1
        return Moment(self._request, self._step, self._branch(ordinal + 1))

    def _branch(self, count: int) -> str:
        """Several calls in one context of one step are different calls: none may reuse another's results."""
        if not self._context:
            return f"call {count}"
        return self._context if count == 1 else f"{self._context}, call {count}"
