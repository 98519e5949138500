"""Turns what a run recorded into a row of the comparison."""

from __future__ import annotations

import math
from statistics import median

from hasten.core.recipe import Recipe
from hasten.measure.comparison import FidelityRecord, Kind, Phases, Row, Status, Steps, Timing
from hasten.measure.quality import Fidelity, describe_difference, mean_fidelity
from hasten.measure.runner import Run


def refused_row(name: str, recipe: Recipe, kind: Kind, reason: str, *, status: Status = "refused") -> Row:
    """A row for a recipe that did not run."""
    return Row(name=name, recipe=str(recipe), kind=kind, status=status, reason=reason)


def finished_row(
    name: str,
    run: Run,
    kind: Kind,
    images: tuple[str, ...],
    baseline: Run | None,
    floor: Fidelity | None,
    *,
    interrupted: bool = False,
) -> Row:
    """A row with everything that was measured; a technique that did not engage makes it a failed one."""
    timing = Timing.of(run.seconds)
    setup = _setup_seconds(run)
    fidelity = None if baseline is None or kind == "baseline" else _fidelity(run, baseline)
    speedup = median(baseline.seconds) / timing.median if baseline is not None else None
    status: Status = "interrupted" if interrupted else "failed" if run.problem else "ok"
    return Row(
        name=name,
        recipe=str(run.recipe),
        kind=kind,
        status=status,
        reason=run.problem,
        seconds_per_image=timing,
        speedup=speedup,
        setup_seconds=setup,
        pays_off_after_images=_pays_off(setup, timing, baseline) if run.recipe.techniques else None,
        peak_memory_bytes=run.peak_memory or None,
        steps=None if interrupted else _steps(run),
        fidelity=FidelityRecord.of(fidelity) if fidelity else None,
        noise_floor=FidelityRecord.of(floor) if floor else None,
        difference=describe_difference(fidelity, floor) if fidelity else None,
        engaged=tuple(evidence.summary for evidence in run.evidence),
        phases=Phases(**run.phases) if run.phases else None,
        images=images,
        changes=tuple(run.changes),
        step_map=None if interrupted else _step_map(run),
    )


def _fidelity(run: Run, baseline: Run) -> Fidelity:
    return mean_fidelity(run.images, baseline.images[: len(run.images)])


def _setup_seconds(run: Run) -> float:
    """Applying the recipe, and what the first picture took longer than the median one."""
    return run.apply_seconds + max(run.first_image_seconds - median(run.seconds), 0.0)


def _pays_off(setup: float, timing: Timing, baseline: Run | None) -> int | None:
    """After how many pictures the saved time exceeds the set-up; None if it never does."""
    saved = median(baseline.seconds) - timing.median if baseline is not None else 0.0
    return math.ceil(setup / saved) if saved > 0 else None


def _steps(run: Run) -> Steps:
    counted = [e for e in run.evidence if e.full_steps is not None and e.reused_steps is not None]
    if not counted:
        return Steps(full=run.workload.steps, reused=0)
    full, reused = counted[0].full_steps or 0, counted[0].reused_steps or 0
    share = full / max(full + reused, 1)
    return Steps(full=round(run.workload.steps * share, 1), reused=round(run.workload.steps * (1 - share), 1))


def _step_map(run: Run) -> dict[str, tuple[bool, ...]] | None:
    maps = [dict(evidence.step_map) for evidence in run.evidence if evidence.step_map]
    return maps[0] if maps else None
