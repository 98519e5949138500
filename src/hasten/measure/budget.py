"""Puts caches on one footing: finds the setting of each at which it computes a given number of steps."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from hasten.core.errors import HastenError, InvalidSetting
from hasten.core.recipe import Recipe
from hasten.core.target import Target
from hasten.core.technique import Technique
from hasten.core.workload import Workload
from hasten.measure.runner import Run, run_recipe

MOST_TRIALS = 10
"""Settings tried for one cache whose decisions only a run can tell."""
LOWEST, HIGHEST = 1e-4, 1e2
"""Thresholds lie between these."""
PICTURES = 2
"""Prompts on which a threshold is found."""


@dataclass(frozen=True)
class Dial:
    """The parameter of a technique that decides how many steps are computed."""

    technique: Technique
    name: str
    kind: str

    def set(self, value: float) -> Technique:
        """The technique with another value there; what stands in its way is set back to its default."""
        number = int(value) if self.kind in ("count", "interval") else float(value)
        fields = type(self.technique).settings()
        rivals = {"speedup", "seconds", "min_psnr", "tolerance"} if self.kind == "count" else set[str]()
        cleared = {name: fields[name].default for name in rivals & set(fields)}
        return dataclasses.replace(self.technique, **{**cleared, self.name: number})


def parse_budget(text: str | float, steps: int) -> int:
    """Full steps of a request of `steps`: "2x" is half of them, "14" or 14 that number; at least 1."""
    found = re.fullmatch(r"(\d{1,4}(?:\.\d{1,3})?)\s*([xX]?)", str(text).strip())
    if not found or not float(found[1]):
        raise HastenError(f"The budget {text!r} is none; write a speed-up such as 2x, or a number of full steps.")
    wanted = steps / float(found[1]) if found[2] else float(found[1])
    if not 1 <= wanted <= steps or (not found[2] and wanted != int(wanted)):
        raise HastenError(f"The budget {text!r} does not fit {steps} steps; 1x to {steps}x do, or 1 to {steps} steps.")
    return max(1, round(wanted))


def dial_of(recipe: Recipe) -> Dial | None:
    """The dial of the recipe's cache; None for a recipe without one."""
    for technique in recipe.techniques:
        for name, item in type(technique).settings().items():
            if "budget" in item.metadata:
                return Dial(technique, name, str(item.metadata["budget"]))
    return None


def at_budget(
    pipeline: Any, recipe: Recipe, workload: Workload, full_steps: int, advance: Callable[[], None] = lambda: None
) -> Recipe:
    """The recipe with its cache set to compute as nearly so many of the workload's steps as it can.

    Fixed schedules are counted; of others a few settings are tried on the first two prompts. A recipe without
    such a cache is returned as it is.
    """
    dial = dial_of(recipe)
    if dial is None:
        return recipe
    if dial.kind == "count":
        return _with(recipe, dial, full_steps)
    sample = workload.replace(prompts=workload.prompts[:PICTURES], seeds=workload.seeds[:1])

    def steps_at(value: float) -> float:
        return _scheduled(pipeline, dial.set(value), workload.steps) or _counted(
            pipeline, _with(recipe, dial, value), sample, advance
        )

    search = _by_interval if dial.kind == "interval" else _by_threshold
    return _with(recipe, dial, search(steps_at, full_steps, workload.steps))


def _with(recipe: Recipe, dial: Dial, value: float) -> Recipe:
    return Recipe(tuple(dial.set(value) if one is dial.technique else one for one in recipe.techniques))


def _by_interval(steps_at: Callable[[float], float], wanted: int, steps: int) -> int:
    return min(range(1, steps + 1), key=lambda interval: (abs(steps_at(interval) - wanted), interval))


def _by_threshold(steps_at: Callable[[float], float], wanted: int, steps: int) -> float:
    """Bisection on the logarithm; more is never computed at a higher threshold."""
    low, high = LOWEST, HIGHEST
    tried: dict[float, float] = {}
    for _ in range(MOST_TRIALS):
        middle = _rounded(math.sqrt(low * high))
        if middle in tried:
            break
        tried[middle] = steps_at(middle)
        if abs(tried[middle] - wanted) < 0.5:
            break
        low, high = (middle, high) if tried[middle] > wanted else (low, middle)
    return min(tried, key=lambda value: (abs(tried[value] - wanted), value))


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")


def _scheduled(pipeline: Any, technique: Technique, steps: int) -> float | None:
    """Steps that a fixed schedule computes, known without a run."""
    policy = cast("Callable[[Any], Any] | None", getattr(technique, "policy", None))
    share = None if policy is None else policy(Target.of(pipeline).denoisers[0]).share(steps)
    return None if share is None else share * steps


def _counted(pipeline: Any, recipe: Recipe, sample: Workload, advance: Callable[[], None]) -> float:
    run = Run(recipe, sample)
    run_recipe(pipeline, run, advance=advance)
    for evidence in run.evidence:
        if evidence.full_steps is not None and evidence.reused_steps is not None:
            return sample.steps * evidence.full_steps / max(evidence.full_steps + evidence.reused_steps, 1)
    if run.problem:
        return float(sample.steps)  # nothing was ever reused
    raise InvalidSetting("This recipe's cache does not tell how many steps it computed.")
