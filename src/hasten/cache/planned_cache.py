"""PlannedCache: a budget in place of a threshold; which steps are computed was found out by calibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

from hasten.cache.engine.controller import ErrorControl
from hasten.cache.engine.course import Courses, graded
from hasten.cache.engine.forecast_preset import ForecastCache
from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.plan_store import AUTO, find_plans, same_grid
from hasten.cache.engine.planned_course import PlannedCourses
from hasten.cache.engine.policy import Policy
from hasten.cache.engine.records import Grid, Plan
from hasten.cache.engine.statistics import Statistics
from hasten.core.clock import Clock
from hasten.core.errors import HastenError, InvalidSetting, Refused
from hasten.core.patch import Patch
from hasten.core.session import applied_to
from hasten.core.target import Target
from hasten.core.technique import Stage, about
from hasten.core.weights import known_hash, weights_hash

USUAL_SPEEDUP = 2.0

__all__ = ["PlannedCache"]


@dataclass(frozen=True, kw_only=True)
class PlannedCache(ForecastCache):
    """Computes the steps that a calibrated plan names and forecasts the others by the rule that it found best there.

    `hasten calibrate` makes plans; those of the bundled models ship with hasten and are found by the model's weights.
    The budget is one of `full_steps`, `speedup`, `seconds` a picture, and `min_psnr` to the plain picture; without
    any, a speed-up of 2. For another number of steps, another scheduler or size the plan is made anew from
    the recorded outputs. For other weights, guidance or quantization it is refused, or only noted with
    `on_mismatch="warn"`. `guard` adds steps where a forecast turns out wrong, and never takes one away.
    """

    paper: ClassVar[str] = "dynamic programming over recorded outputs; see docs/caching.md"

    plan: str = field(
        default=AUTO, metadata=about("name or file of the plan; auto finds it by the weights", trial="emoji-flux-28")
    )
    full_steps: int | None = field(default=None, metadata=about("how many steps are computed", ge=1, budget="count"))
    speedup: float | None = field(default=None, metadata=about("how much faster at least", ge=1.0))
    seconds: float | None = field(default=None, metadata=about("time for one picture, in seconds", gt=0.0))
    min_psnr: float | None = field(default=None, metadata=about("likeness to the plain picture, in dB", gt=0.0))
    on_mismatch: Literal["refuse", "warn"] = field(
        default="refuse", metadata=about("what to do when the plan was made for something else", trial="warn")
    )
    guard: float | None = field(
        default=None, metadata=about("error that a stretch of steps may make before steps are added", gt=0.0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self._budget()) > 1:
            raise InvalidSetting(f"PlannedCache takes one budget, not {' and '.join(self._budget())}.")

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a plan that was made for these weights, and holds one for the budget."""
        yield from super().problems(target)
        if target.device.type != "meta":
            yield from self._no_plan(target)

    def _no_plan(self, target: Target) -> Iterator[str]:
        module = target.denoisers[0].module
        weights = weights_hash(module)
        try:
            files = find_plans(self.plan, weights)
            for file in files:
                self._choose(file)
        except HastenError as error:
            yield str(error)
            return
        if not files:
            yield f"no plan for this model ships with hasten; make one: {_command('MODEL', 28)}, then plan='plan.json'."
        elif self.on_mismatch == "refuse" and all(file.key.weights_sha256 != weights for file in files):
            key = files[0].key
            yield (
                f"the plan was made for other weights ({key.model}); make one for these: "
                f"{_command('MODEL', key.steps)}, or set on_mismatch='warn'."
            )

    def snapshots(self) -> int:
        """Plans use rules of order 2 at most."""
        return 3

    def schedule(self, steps: int) -> tuple[int, ...]:
        """As many even steps as the budget is likely to allow; the plan knows better."""
        wanted = self.full_steps or math.ceil(steps / (self.speedup or USUAL_SPEEDUP))
        return graded(steps, wanted, 1.0)

    def courses(self, target: Target, patch: Patch, statistics: Statistics) -> Courses:
        """The plan for the budget, checked against what runs."""
        module = target.denoisers[0].module
        files = find_plans(self.plan, known_hash(module) or weights_hash(module))
        if not files:
            raise Refused([f"There is no plan for this model; make one: {_command('MODEL', 28)}."])
        check = partial(self._check, target, statistics)
        return Courses(patch.clock, PlannedCourses(files, self._choose, check, statistics))

    def control(self, courses: Courses, clock: Clock) -> Policy:
        """The plan, guarded where that is wanted."""
        if self.guard is None:
            return super().control(courses, clock)
        return ErrorControl(self.guard, clock, courses.computes)

    def in_words(self) -> str:
        """The budget."""
        budget = " ".join(f"{name}={value:g}" for name, value in self._budget().items())
        return f"is computed as planned ({budget or f'speedup={USUAL_SPEEDUP:g}'}) and forecast in the other steps"

    def _budget(self) -> dict[str, float]:
        given = {name: getattr(self, name) for name in ("full_steps", "speedup", "seconds", "min_psnr")}
        return {name: value for name, value in given.items() if value is not None}

    def _choose(self, file: PlanFile) -> Plan:
        budget = self._budget() or {"speedup": USUAL_SPEEDUP}
        return file.choose(**budget)  # pyright: ignore[reportArgumentType]

    def _check(self, target: Target, statistics: Statistics, file: PlanFile, grid: Grid) -> None:
        """Refuse, or note, what the plan was not made for and what planning anew does not mend."""
        module, key = target.denoisers[0].module, file.key
        differences = tuple(_differences(target, file))
        if known_hash(module) != key.weights_sha256:
            differences = (f"the weights are not those of {key.model}", *differences)
        if not differences:
            return
        if self.on_mismatch == "refuse":
            steps = grid.steps if same_grid(file.grid, grid) else key.steps
            raise Refused(
                [f"The plan does not fit: {', '.join(differences)}. Make one: {_command(key.model, steps)}, "
                 f"or set on_mismatch='warn'."]
            )  # fmt: skip
        for difference in differences:
            statistics.notes[f"requests although {difference}"] += 1


def underneath(target: Target) -> str:
    """What changes the outputs beneath a cache: the lossy techniques of this session that are no caches."""
    found = applied_to(target.denoisers[0].module)
    return " | ".join(str(item) for item in found if type(item).lossy and type(item).stage != Stage.CACHE)


def guidance_of(pipeline: object) -> float | None:
    """The guidance scale of the request that a pipeline is working on; None where it does not say."""
    value = getattr(pipeline, "_guidance_scale", None)
    return float(value) if isinstance(value, int | float) else None


def _differences(target: Target, file: PlanFile) -> Iterator[str]:
    recipe, guidance, planned = underneath(target), guidance_of(target.pipeline), file.key.guidance
    if recipe != file.key.recipe:
        yield f"{recipe or 'nothing'} is applied underneath, calibrated with {file.key.recipe or 'nothing'}"
    if guidance is not None and planned is not None and not math.isclose(guidance, planned, rel_tol=1e-3):
        yield f"the guidance is {guidance:g}, calibrated with {planned:g}"


def _command(model: str, steps: int) -> str:
    return f"hasten calibrate {model} --for plan --steps {steps} -o plan.json"
