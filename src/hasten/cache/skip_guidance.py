"""SkipGuidance: on some steps the unconditional half of guidance is not computed but derived from the conditional."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from hasten.cache.engine.guidance import GuidanceSchedule
from hasten.cache.engine.guidance_calls import SeparateGuidance
from hasten.cache.engine.guidance_halves import BatchedGuidance
from hasten.cache.engine.statistics import Statistics
from hasten.cache.engine.taylor import hold_or_taylor
from hasten.cache.engine.values import size_in_bytes
from hasten.cache.engine.work import example_call, stand_in
from hasten.core.errors import InvalidSetting, NotEngaged
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Denoiser, Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload

HALF = 0.5


@dataclass(frozen=True, kw_only=True)
class SkipGuidance(Technique):
    """Computes the unconditional half of guidance every `interval`-th step; between, it is the conditional less a
    kept difference.

    The difference cond - uncond of the network's outputs changes little from step to step, so a step without it does
    half the work. Outside of start to stop, shares of the request's steps, guidance is off: the unconditional
    output is taken to be the conditional one. Where both halves come in one batch, its first two steps are always
    computed, because only then is it certain that the batch is guided. The count is of halves.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    lossy: ClassVar[bool] = True
    cuts_blocks: ClassVar[bool] = True  # compiled blocks see the batch in two sizes
    paper: ClassVar[str] = (
        "CFG-Cache of FasterCache (2024), arXiv:2410.19355, without its frequency split; "
        "limited intervals: Kynkaanniemi et al. (2024), arXiv:2404.07724"
    )

    interval: int = field(
        default=2, metadata=about("every how many steps the unconditional half is computed", ge=1, off=1)
    )
    start: float = field(
        default=0.0, metadata=about("share of the steps before which guidance is off", ge=0.0, le=1.0, off=0.0)
    )
    stop: float = field(
        default=1.0, metadata=about("share of the steps from which guidance is off", ge=0.0, le=1.0, off=1.0)
    )
    order: int = field(
        default=0, metadata=about("order of the Taylor forecast of the difference; 0 holds it", ge=0, le=2)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop < self.start:
            raise InvalidSetting(f"SkipGuidance(start={self.start}, stop={self.stop}): stop must not be below start.")

    @property
    def _schedule(self) -> GuidanceSchedule:
        return GuidanceSchedule(self.interval, self.start, self.stop)

    def claims(self) -> tuple[str, ...]:
        """Decides what is computed; other caches would see batches and calls come and go."""
        return ("stack.compute:*",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs guidance by a second output of the same network."""
        for denoiser in target.denoisers:
            yield from _no_guidance(denoiser)

    def apply(self, target: Target, patch: Patch) -> None:
        """Intercept every denoiser's call."""
        statistics = patch.keep(Statistics(counted="halves of guidance"))
        for denoiser in target.denoisers:
            form = SeparateGuidance if denoiser.spec.guidance == "separate" else BatchedGuidance
            form(denoiser, self._schedule, hold_or_taylor(self.order), patch.clock, statistics).install(patch)

    def engaged(self, session: Session) -> Evidence:
        """Some unconditional halves really were left out."""
        statistics = session.state(self, Statistics)
        if statistics.full and not statistics.reused and not statistics.reasons and self != self.inert():
            raise NotEngaged("SkipGuidance saw no unconditional half to leave out; is the pipeline's guidance off?")
        return statistics.evidence("SkipGuidance", may_never_reuse=self == self.inert())

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Half a step's work where the unconditional half is left out; memory is one side's output per value held.

        Held are the differences, a forecast of them, and with separate calls the conditional output of the step.
        """
        denoiser = stand_in(target.denoisers[0])
        output = denoiser.module(**example_call(denoiser, target, workload))
        separate = denoiser.spec.guidance == "separate"
        one_side = size_in_bytes(output) // (1 if separate else 2)
        differences = 0 if self.interval == 1 else self.order + 1 + (self.order > 0)
        share = self._schedule.computed(workload.steps) / workload.steps
        return Cost(time_factor=share + (1 - share) * HALF, extra_bytes=one_side * (differences + separate))


def _no_guidance(denoiser: Denoiser) -> Iterable[str]:
    name = denoiser.spec.model_class
    if denoiser.spec.guidance == "embedded":
        yield (
            f"{name} has guidance built in and makes one call a step, so there is no unconditional half to leave "
            f"out; use FirstBlockCache or DBCache."
        )
    elif denoiser.spec.guidance == "none":
        yield f"hasten does not know how {name} is guided; add a specification for it."
