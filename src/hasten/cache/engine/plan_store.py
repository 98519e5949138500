"""Finds plan files: those that ship with hasten, by name or by the weights they are for, and the user's own."""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Grid
from hasten.core.errors import HastenError, UnknownName
from hasten.core.sampler import SamplerFacts

AUTO = "auto"


def shipped() -> dict[str, Path]:
    """The plan files that come with hasten, by name."""
    folder = Path(str(resources.files("hasten"))) / "data" / "plans"
    return {file.stem: file for file in sorted(folder.glob("*.json"))}


def find_plans(plan: str, weights: str | None) -> tuple[PlanFile, ...]:
    """The plan files meant by a name or path; with "auto" those for these weights, which can be none.

    Raises HastenError for a file that is missing or damaged, and UnknownName for a name that is neither.
    """
    if plan == AUTO:
        files = [read_plan(file) for file in shipped().values()]
        return tuple(file for file in files if file.key.weights_sha256 == weights)
    if plan in shipped():
        return (read_plan(shipped()[plan]),)
    if not Path(plan).suffix:
        raise UnknownName("plan", plan, shipped())
    return (read_plan(Path(plan).expanduser()),)


def read_plan(file: Path) -> PlanFile:
    """Read a plan file; one that has not changed is read once."""
    try:
        changed = file.stat().st_mtime_ns
    except OSError:
        changed = 0
    return _read(file, changed)


@functools.lru_cache(maxsize=32)
def _read(file: Path, changed: int) -> PlanFile:
    return PlanFile.load(file)


def grid_of(facts: SamplerFacts) -> Grid:
    """The sampler's noise levels as a plan file keeps them; raises HastenError where they do not fall strictly."""
    try:
        return Grid(
            alpha=tuple(level.alpha for level in facts.levels),
            sigma=tuple(level.sigma for level in facts.levels),
            prediction=facts.prediction,
            solver="dpmpp_2m" if facts.solver == "dpmpp_2m" else "euler",
        )
    except ValueError as error:
        raise HastenError("The sampler visits a noise level twice, for which no plan can be made.") from error


def same_grid(one: Grid, other: Grid, tolerance: float = 1e-4) -> bool:
    """Do two grids have the same noise levels, up to rounding, and the same kind of sampler?"""
    alike = (one.steps, one.prediction, one.solver) == (other.steps, other.prediction, other.solver)
    return alike and all(abs(a - b) < tolerance for a, b in zip(one.flow_time, other.flow_time, strict=True))


def nearest_file(files: tuple[PlanFile, ...], grid: Grid) -> PlanFile:
    """The file made for this grid; else that with the nearest number of steps, rather more than fewer."""
    exact = [file for file in files if same_grid(file.grid, grid)]
    return exact[0] if exact else min(files, key=lambda file: _distance(file.grid.steps, grid.steps))


def _distance(recorded: int, wanted: int) -> tuple[bool, int]:
    return recorded < wanted, abs(recorded - wanted)
