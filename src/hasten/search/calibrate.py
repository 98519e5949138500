"""Calibration of a model: from a few uncached pictures to a plan for every number of full steps.

Uncached runs are recorded as inner products of their outputs, a few disturbed runs tell how much an error at each step
matters, dynamic programming proposes plans, and the most promising ones, uniform ones among them, are tried for real
on other prompts: predictions are optimistic, and only pictures decide.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from PIL import Image

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Goal, Grid, Plan, PlanKey, SeedRecord, SolverAnswer
from hasten.cache.planned_cache import guidance_of
from hasten.cache.planning.gains import interpolated_gains, landing_gain
from hasten.cache.planning.planner import Planner
from hasten.cache.planning.recording import Recorder
from hasten.cache.planning.replan import standing_plans
from hasten.core.errors import HastenError
from hasten.core.intercept import base_class
from hasten.core.recipe import Recipe
from hasten.core.target import Target
from hasten.core.weights import weights_hash
from hasten.core.workload import Workload
from hasten.measure.progress import Progress, Silent
from hasten.measure.rendering import native_size
from hasten.measure.runner import Picture
from hasten.models import LoadedModel
from hasten.search.plan_runs import Bench, Watched, psnr
from hasten.search.shortlist import budgets, by_likeness, shortlist
from hasten.search.solver_runs import SecondOrder

GOALS: dict[str, Goal] = {"reproduce": "reproduce", "converge": "converge"}
FIRST_SEED = 1000
"""Seeds of calibration pictures begin here, apart from those that comparisons use."""
FINE = 200
"""Steps of the converged sampler, at least."""
FIRST_ROUND = 2
"""Pictures on which all promising plans are tried."""
LEAST_LEFT = 4
"""Plans that are tried on all pictures."""
SEEDS = 2
"""Pictures of each prompt that chooses among plans."""
DISTURBED_NODES = 6
DISTURBED_PICTURES = 2
ASTRAY = 0.05
"""Largest difference between the sampler's result and that of the recorded outputs, relative to the latter."""


@dataclass
class Calibration:
    """A calibration while it runs."""

    bench: Bench
    model: str
    goal: Goal
    records: list[SeedRecord] = field(default_factory=list[SeedRecord])
    runs: list[Watched] = field(default_factory=list[Watched])
    references: dict[Picture, Image.Image] = field(default_factory=dict[Picture, Image.Image])


def calibrate_plan(
    model: LoadedModel,
    workload: Workload | None = None,
    *,
    goal: Goal = "reproduce",
    recipe: Recipe | None = None,
    file: Path | None = None,
    progress: Progress | None = None,
) -> PlanFile:
    """Make a plan file for a model, with `workload`'s steps, size and guidance; saved in `file` as it grows.

    The first half of the prompts is recorded, the others choose among plans. `recipe` runs underneath, as it will
    later. With the goal "converge" pictures are compared with those of many steps, not with the plain ones. An
    interruption leaves in `file` what is finished. Raises HastenError for samplers that cannot be planned.
    """
    work, shown = workload or model.workload, progress or Silent()
    if len(work.prompts) < 2:
        raise HastenError("Calibration needs at least two prompts: some are recorded, others choose among plans.")
    half = max(1, len(work.prompts) // 2)
    recorded = [(prompt, FIRST_SEED + number) for number, prompt in enumerate(work.prompts[:half])]
    others = [(prompt, FIRST_SEED + half + seed) for seed in range(SEEDS) for prompt in work.prompts[half:]]
    shown.start(1, _count(half, len(others), work.steps))
    job = Calibration(Bench(model.pipeline, recipe or Recipe(), work, shown.advance), model.name, goal)
    made = _recorded(job, recorded, shown)
    _save(made, file)
    return _tried(job, made, others, shown, lambda found: _save(found, file))


def _count(recorded: int, tried: int, steps: int) -> int:
    return recorded + min(DISTURBED_PICTURES, recorded) * DISTURBED_NODES + tried + len(budgets(steps)) * 11 * tried


def _save(made: PlanFile, file: Path | None) -> None:
    if file is not None:
        made.save(file)


def _recorded(job: Calibration, pictures: Sequence[Picture], progress: Progress) -> PlanFile:
    """Record uncached runs and disturb some; the file holds what dynamic programming makes of them."""
    progress.row("recording")
    for prompt, seed in pictures:
        run = job.bench.watch(prompt, seed)
        job.records.append(_record(run, prompt, seed))
        job.runs.append(run if len(job.runs) < DISTURBED_PICTURES else Watched())
    grid = job.runs[0].grid
    progress.row("disturbing")
    gains = _gains(job, grid, pictures)
    made = PlanFile(key=_key(job, grid), grid=grid, gains=gains, records=tuple(job.records))
    return made.with_plans(standing_plans(Planner.of(grid, job.records, gains)))


def _record(run: Watched, prompt: str, seed: int) -> SeedRecord:
    grid = run.grid
    recorder = Recorder(grid, run.points[0].state)
    for point in run.points:
        recorder.add(point.velocity)
    if run.final is None:
        raise HastenError("The run ended before its last step, so that no plan can be made.")
    apart = recorder.discrepancy(run.final)
    if not apart <= ASTRAY:
        problem = f"The sampler does not go where its outputs point (difference {apart:.2g})"
        raise HastenError(f"{problem}, so that no plan can be made.")
    return recorder.record(seed=seed, prompt=prompt)


def _gains(job: Calibration, grid: Grid, pictures: Sequence[Picture]) -> tuple[float, ...]:
    nodes = sorted({round(node) for node in np.linspace(1, grid.steps - 1, DISTURBED_NODES)})
    measured: dict[int, list[float]] = {node: [] for node in nodes if node > 0}
    for (prompt, seed), plain in zip(pictures, job.runs[:DISTURBED_PICTURES], strict=False):
        for node, values in measured.items():
            kick = _kick(plain, grid, node)
            final = job.bench.watch(prompt, seed, Watched(node, kick)).final
            if plain.final is not None and final is not None:
                values.append(landing_gain(plain.final, final, kick))
    return interpolated_gains(grid, measured) if measured else ()


def _kick(plain: Watched, grid: Grid, node: int) -> torch.Tensor:
    """The error that holding the output for one step makes."""
    move = grid.flow_time[node] - grid.flow_time[node - 1]
    return move * (plain.points[node - 1].velocity - plain.points[node].velocity)


def _tried(
    job: Calibration, made: PlanFile, pictures: Sequence[Picture], progress: Progress, save: Callable[[PlanFile], None]
) -> PlanFile:
    """Try the most promising plans of some budgets for real; the others follow the nearest that was tried."""
    progress.row("references")
    references, seconds = _references(job, pictures)
    made = made.model_copy(update={"plain_seconds": seconds})
    planner = Planner.of(made.grid, made.records, made.gains)
    winners: dict[int, Plan] = {}
    for budget in budgets(made.grid.steps):
        progress.row(f"{budget} of {made.grid.steps} steps")
        tried = _contest(job, list(shortlist(planner, budget)), pictures, references)
        winners[budget] = tried[0]
        answers = _solvers(job, planner, budget, pictures, references)
        made = _with(made, tried).model_copy(update={"solvers": (*made.solvers, *answers)})
        save(made)
    made = by_likeness(made, planner, winners)
    save(made)
    return made


def _references(job: Calibration, pictures: Sequence[Picture]) -> tuple[list[Image.Image], float]:
    bench = job.bench
    images, seconds = bench.pictures(Recipe(), pictures)
    if job.goal == "converge":
        steps = max(FINE, 4 * bench.workload.steps)
        fine = dataclasses.replace(bench, workload=bench.workload.replace(steps=steps))
        images, _ = fine.pictures(Recipe((SecondOrder(nodes=tuple(range(steps))),)), pictures)
    return images, seconds


def _contest(
    job: Calibration, plans: list[Plan], pictures: Sequence[Picture], references: Sequence[Image.Image]
) -> list[Plan]:
    """The plans, best first; with what was measured where that was on all pictures.

    Each round doubles the pictures and halves the plans; the best planned and the best even one stay to the end.
    """
    scores: dict[Plan, list[float]] = {plan: [] for plan in plans}
    seconds: dict[Plan, list[float]] = {plan: [] for plan in plans}
    left, done = plans, 0
    while done < len(pictures):
        until = min(2 * done or FIRST_ROUND, len(pictures))
        for plan in left:
            images, duration = job.bench.plan(plan, pictures[done:until])
            scores[plan] += [psnr(a, b) for a, b in zip(images, references[done:until], strict=True)]
            seconds[plan].append(duration)
        left, done = sorted(left, key=lambda plan: -float(np.mean(scores[plan]))), until
        left = left if done == len(pictures) else _survivors(left)
    finalists = [_measured(plan, scores[plan], seconds[plan]) for plan in left]
    return finalists + [plan for plan in plans if plan not in left]


def _solvers(
    job: Calibration, planner: Planner, budget: int, pictures: Sequence[Picture], references: Sequence[Image.Image]
) -> list[SolverAnswer]:
    """As many steps of DPM-Solver++(2M), at chosen and at even nodes, measured on the same pictures."""
    answers: list[SolverAnswer] = []
    for answer in planner.solver_candidates(budget, goal=job.goal) if planner.grid.solver == "euler" else ():
        images, seconds = job.bench.pictures(Recipe((SecondOrder(nodes=answer.nodes),)), pictures)
        score = float(np.mean([psnr(a, b) for a, b in zip(images, references, strict=True)]))
        measured = {"measured_psnr": round(score, 2), "measured_seconds": round(seconds, 4)}
        answers.append(answer.model_copy(update=measured))
    return answers


def _survivors(ranked: list[Plan]) -> list[Plan]:
    best = ranked[: max(LEAST_LEFT, (len(ranked) + 1) // 2)]
    missing = {plan.origin for plan in ranked} - {plan.origin for plan in best}
    return best + [next(plan for plan in ranked if plan.origin == origin) for origin in sorted(missing)]


def _measured(plan: Plan, scores: Sequence[float], seconds: Sequence[float]) -> Plan:
    return plan.model_copy(
        update={"measured_psnr": round(float(np.mean(scores)), 2), "measured_seconds": round(min(seconds), 4)}
    )


def _with(made: PlanFile, tried: Sequence[Plan]) -> PlanFile:
    """The file with the plans that were tried in place of those for that number of steps; the first is chosen."""
    others = tuple(plan for plan in made.plans if plan.full_steps != tried[0].full_steps)
    kept = [plan.model_copy(update={"chosen": number == 0}) for number, plan in enumerate(tried)]
    return made.model_copy(update={"plans": others}).with_plans(kept)


def _key(job: Calibration, grid: Grid) -> PlanKey:
    pipeline, work = job.bench.pipeline, job.bench.workload
    target = Target.of(pipeline)
    guidance = guidance_of(pipeline)
    return PlanKey(
        model=job.model,
        weights_sha256=weights_hash(target.denoisers[0].module),
        scheduler=base_class(target.scheduler).__name__,
        scheduler_config=_facts(target.scheduler),
        steps=grid.steps,
        width=work.width or native_size(pipeline),
        height=work.height or native_size(pipeline),
        guidance=work.guidance if guidance is None else guidance,
        recipe=str(job.bench.recipe) if job.bench.recipe.techniques else "",
        goal=job.goal,
    )


def _facts(scheduler: Any) -> dict[str, str | bool | int | float | None]:
    """The scheduler's settings, as far as they are plain values."""
    settings = cast("dict[str, Any]", dict(scheduler.config))
    plain = {name: value for name, value in settings.items() if isinstance(value, str | bool | int | float | None)}
    return {name: value for name, value in sorted(plain.items()) if not name.startswith("_")}
