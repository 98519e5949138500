"""The main job: several recipes on the same prompts and seeds, against the plain pipeline and fewer steps."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any

from hasten.core.errors import HastenError, Refused
from hasten.core.files import atomic_write_bytes, ensure_writable
from hasten.core.memory_limit import OutOfMemory
from hasten.core.recipe import Recipe, as_recipe
from hasten.core.resolve import resolve
from hasten.core.target import Target
from hasten.core.technique import Technique
from hasten.core.workload import Workload
from hasten.measure.budget import at_budget, parse_budget
from hasten.measure.comparison import Comparison, Kind, Row, WorkloadRecord
from hasten.measure.environment import environment, precision
from hasten.measure.folder import pictures_in, remove_pictures
from hasten.measure.progress import Progress, Silent
from hasten.measure.quality import Fidelity, mean_fidelity
from hasten.measure.rendering import native_size
from hasten.measure.rows import finished_row, refused_row
from hasten.measure.runner import Run, run_recipe
from hasten.measure.solvers import TITLES, best_for, other_solver, solver_problem

NamedRecipe = tuple[str, Recipe]
Rescue = Callable[[OutOfMemory, Recipe], Recipe]
"""Says which recipe to run in place of one that ran out of memory, or raises the error (with advice)."""
FLOOR_RECIPE = "AttentionBackend(name='math')"
"""Same mathematics in another order of operations: what it changes is the noise floor."""

DRIFT = 1.25
"""Factor by which the plain pipeline's time may change during a comparison without a warning."""


@dataclass
class _Job:
    """One comparison while it runs."""

    pipeline: Any
    workload: Workload
    runs: int
    out: Path | None
    progress: Progress
    title: str
    rows: list[Row] = field(default_factory=list[Row])
    baseline: Run | None = None
    floor: Fidelity | None = None
    interrupted: bool = False
    budget: int | None = None
    """Full steps to which every cache is set."""
    warnings: list[str] = field(default_factory=list[str])
    rescue: Rescue | None = None
    base: Recipe = field(default_factory=Recipe)
    """Techniques of every row, without which the pipeline does not fit."""


def compare(
    pipeline: Any,
    recipes: Sequence[Recipe | Technique | str | NamedRecipe],
    workload: Workload,
    *,
    runs: int = 1,
    out: str | Path | None = None,
    fewer_steps: bool = True,
    progress: Progress | None = None,
    title: str = "",
    budget: str | float | None = None,
    rescue: Rescue | None = None,
    base: Recipe | None = None,
) -> Comparison:
    """Run every recipe on the same prompts and seeds, the plain pipeline first, and return the comparison.

    With `out`, pictures, `comparison.json` and `report.html` are written there, also after Ctrl-C (then marked
    incomplete). A refused or failing recipe gets a row with the reason. `fewer_steps` adds, for each lossy recipe
    that was faster, the plain pipeline with as many steps as fit into the same time, and a better solver with as
    many. With a `budget` ("2x", or a number of full steps) every cache is set to compute that many steps, and the plain
    pipeline takes so many. `base` is added to every recipe, the plain one included; where memory runs out, `rescue`
    says what to run instead.
    """
    if not workload.prompts:
        raise HastenError("A comparison needs at least one prompt.")
    folder = ensure_writable(out) if out is not None else None
    job = _Job(pipeline, workload, max(runs, 1), folder, progress or Silent(), title or type(pipeline).__name__)
    job.rescue, job.base = rescue, base or Recipe()
    job.budget = None if budget is None else parse_budget(budget, workload.steps)
    named = [_named(recipe) for recipe in recipes]
    try:
        _run_all(job, named, fewer_steps)
    except KeyboardInterrupt:
        job.interrupted = True
    comparison = _comparison(job)
    if folder is not None:
        earlier = pictures_in(folder)
        comparison = comparison.in_folder(folder)
        comparison.to_json(folder / "comparison.json")
        comparison.to_html(folder / "report.html")
        remove_pictures(earlier - pictures_in(folder))
    return comparison


def _named(recipe: Recipe | Technique | str | NamedRecipe) -> NamedRecipe:
    if isinstance(recipe, tuple):
        return recipe
    parsed = as_recipe(recipe)
    return (recipe if isinstance(recipe, str) else str(parsed)), parsed


def _run_all(job: _Job, recipes: list[NamedRecipe], fewer_steps: bool) -> None:
    others = [(name, recipe) for name, recipe in recipes if recipe.techniques]
    job.progress.start(1 + len(others), job.workload.images * job.runs + 1)
    _run_row(job, "plain", Recipe(), "baseline")
    _measure_floor(job)
    for name, recipe in others:
        _run_row(job, *_within_budget(job, name, recipe), "recipe")
    if fewer_steps:
        for steps in _matched_steps(job) if job.budget is None else [job.budget]:
            _run_controls(job, steps)
    _check_drift(job)


def _run_controls(job: _Job, steps: int) -> None:
    """The plain pipeline with so many steps, and a better solver with as many: a cache has to beat both."""
    fewer = job.workload.replace(steps=steps)
    _run_row(job, f"plain, {steps} steps", Recipe(), "fewer_steps", fewer)
    scheduler = getattr(job.pipeline, "scheduler", None)
    if solver_problem(scheduler) is None:
        title = TITLES[best_for(scheduler)]
        with other_solver(job.pipeline):
            _run_row(job, f"{title}, {steps} steps", Recipe(), "other_solver", fewer)


def _within_budget(job: _Job, name: str, recipe: Recipe) -> NamedRecipe:
    """The recipe with its cache set to the budget, named after what was set; one that cannot run stays as it is."""
    if job.budget is None or resolve(recipe, Target.of(job.pipeline)).refusals:
        return name, recipe
    job.progress.row(f"setting of {name}")
    try:
        found = at_budget(job.pipeline, recipe, job.workload, job.budget)
    except HastenError:
        return name, recipe
    return (name if found == recipe else str(found)), found


def _run_row(job: _Job, name: str, recipe: Recipe, kind: Kind, workload: Workload | None = None) -> None:
    recipe |= job.base
    refusals = resolve(recipe, Target.of(job.pipeline)).refusals
    if refusals:
        job.rows.append(refused_row(name, recipe, kind, " ".join(refusals)))
        job.progress.skip()
        return
    job.progress.row(name)
    run = Run(recipe, workload or job.workload)
    try:
        _run_or_rescue(job, name, run)
    except KeyboardInterrupt:
        if run.images:
            _finish(job, name, run, kind, interrupted=True)
        raise
    except Refused as error:
        job.rows.append(refused_row(name, recipe, kind, str(error)))
    except Exception as error:
        if kind == "baseline":
            raise
        job.rows.append(refused_row(name, recipe, kind, _reason(error), status="failed"))
    else:
        _finish(job, name, run, kind)


def _run_or_rescue(job: _Job, name: str, run: Run) -> None:
    """Run a recipe, and when memory runs out what is to be run instead, until one fits."""
    while True:
        try:
            return run_recipe(job.pipeline, run, runs=job.runs, advance=job.progress.advance)
        except OutOfMemory as error:
            if job.rescue is None:
                raise
            run.restart(job.rescue(error, run.recipe))
        job.warnings.append(f"{name} ran out of memory; {run.recipe} was run in its place.")


def _finish(job: _Job, name: str, run: Run, kind: Kind, *, interrupted: bool = False) -> None:
    if kind == "baseline":
        job.baseline = run
    images = _save(job, name, run)
    job.rows.append(finished_row(name, run, kind, images, job.baseline, job.floor, interrupted=interrupted))


def _measure_floor(job: _Job) -> None:
    """Repeat up to two plain pictures with another order of operations; without such a kernel there is no floor."""
    baseline = job.baseline
    recipe = as_recipe(FLOOR_RECIPE)
    if baseline is None or resolve(recipe, Target.of(job.pipeline)).refusals:
        return
    sample = job.workload.replace(prompts=job.workload.prompts[:2], seeds=job.workload.seeds[:1])
    references = [baseline.images[index * len(job.workload.seeds)] for index in range(len(sample.prompts))]
    run = Run(recipe, sample)
    with suppress(HastenError):
        run_recipe(job.pipeline, run)
        job.floor = mean_fidelity(run.images, references)


def _check_drift(job: _Job) -> None:
    """Time the plain pipeline once more: on a machine that became busier or idler, speed-ups mean little."""
    if job.baseline is None:
        return
    again = Run(Recipe(), job.workload.replace(prompts=job.workload.prompts[:2], seeds=job.workload.seeds[:1]))
    try:
        run_recipe(job.pipeline, again)
    except HastenError:
        return
    before, after = median(job.baseline.seconds), median(again.seconds)
    if not 1 / DRIFT < after / before < DRIFT:
        job.warnings.append(
            f"The machine's speed changed meanwhile: the plain pipeline took {before:.3g} s a picture at first and "
            f"{after:.3g} s at the end, so speed-ups are not reliable; run again when nothing else is running."
        )


def _matched_steps(job: _Job) -> list[int]:
    """Step counts at which the plain pipeline takes as long as each lossy recipe that was clearly faster."""
    baseline = job.rows[0].seconds_per_image
    lossy = [row for row in job.rows if row.kind == "recipe" and row.speedup and row.steps and row.steps.reused]
    if baseline is None:
        return []
    found = {
        max(1, round(job.workload.steps * row.seconds_per_image.median / baseline.median))
        for row in lossy
        if row.seconds_per_image and row.speedup and row.speedup > 1.1
    }
    return _apart([steps for steps in sorted(found, reverse=True) if steps < job.workload.steps])


def _apart(counts: list[int]) -> list[int]:
    """Leave out step counts that are within a fifth of the one before: their rows would say the same."""
    kept: list[int] = []
    for count in counts:
        if not kept or count <= 0.8 * kept[-1]:
            kept.append(count)
    return kept


def _save(job: _Job, name: str, run: Run) -> tuple[str, ...]:
    if job.out is None:
        return ()
    folder, paths = f"{len(job.rows):02d}-{_slug(name)}", []
    for image, (prompt, seed) in zip(run.images, run.pictures, strict=False):
        path = f"{folder}/{run.workload.prompts.index(prompt):02d}-seed{seed}.png"
        buffer = BytesIO()
        image.save(buffer, "PNG")
        atomic_write_bytes(job.out / path, buffer.getvalue())
        paths.append(path)
    return tuple(paths)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60] or "row"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:400] if isinstance(error, HastenError) else f"{type(error).__name__}: {text[:400]}"


def _comparison(job: _Job) -> Comparison:
    target, workload = Target.of(job.pipeline), job.workload
    size = (workload.width or native_size(job.pipeline), workload.height or native_size(job.pipeline))
    record = WorkloadRecord(
        model=job.title,
        denoiser=target.denoisers[0].spec.model_class,
        dtype=precision(target),
        device=str(target.device),
        width=size[0],
        height=size[1],
        steps=workload.steps,
        guidance=workload.guidance,
        prompts=workload.prompts,
        seeds=workload.seeds,
        max_sequence_length=workload.max_sequence_length,
        runs=job.runs,
    )
    facts = environment(target.device) | {"date": time.strftime("%Y-%m-%d %H:%M")}
    return Comparison(
        environment=facts,
        workload=record,
        rows=tuple(job.rows),
        incomplete=job.interrupted,
        warnings=tuple(job.warnings),
    )
