"""From plan files and a budget to the course of a request: the stored plan, or one made anew for another sampler."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hasten.cache.engine.course import Course, graded
from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.plan_store import grid_of, nearest_file, same_grid
from hasten.cache.engine.records import Grid, Plan
from hasten.cache.engine.rules import Rule
from hasten.cache.engine.statistics import Statistics
from hasten.cache.planning.replan import replan
from hasten.core.errors import HastenError
from hasten.core.sampler import SamplerFacts

EVEN = Rule("velocity", "index", 1, trust=0.5)
"""The rule of a request for which no plan can be made."""


@dataclass
class PlannedCourses:
    """Makes courses, and remembers those that had to be planned anew; one per session."""

    files: tuple[PlanFile, ...]
    choose: Callable[[PlanFile], Plan]
    """Picks the plan for the budget."""
    check: Callable[[PlanFile, Grid], None]
    """Raises, or notes, what the file was not made for."""
    statistics: Statistics
    _anew: dict[Grid, PlanFile] = field(default_factory=dict[Grid, PlanFile])

    def __call__(self, facts: SamplerFacts) -> Course:
        """The course of a request with this sampler."""
        try:
            grid = grid_of(facts)
        except HastenError:
            return self._even(facts.steps, self.choose(self.files[0]), self.files[0])
        file = nearest_file(self.files, grid)
        self.check(file, grid)
        plan = self.choose(file)
        if not same_grid(file.grid, grid):
            found = self._planned_anew(file, plan, grid)
            if found is None:
                return self._even(facts.steps, plan, file)
            plan = found
        self.statistics.notes[f"planned requests with {plan.full_steps} of {grid.steps} full steps"] += 1
        return Course(plan.compute, plan.parsed_rules())

    def _planned_anew(self, file: PlanFile, plan: Plan, grid: Grid) -> Plan | None:
        """The plan for the same share of full steps on another grid; None where the records do not reach so far."""
        try:
            if grid not in self._anew:
                key = file.key.model_copy(update={"steps": grid.steps})
                self._anew[grid] = replan(file, key, grid)
        except HastenError:
            return None
        self.statistics.notes["requests planned anew from the records"] += 1
        wanted = full_steps_for(plan, file.grid.steps, grid.steps)
        usable = [found for found in self._anew[grid].plans if found.chosen]
        return min(usable, key=lambda found: (abs(found.full_steps - wanted), found.full_steps))

    def _even(self, steps: int, plan: Plan, file: PlanFile) -> Course:
        self.statistics.notes["requests that could not be planned, with even steps"] += 1
        compute = graded(steps, full_steps_for(plan, file.grid.steps, steps), 1.0)
        return Course(compute, (EVEN,) * len(compute))


def full_steps_for(plan: Plan, planned: int, steps: int) -> int:
    """The same share of full steps in a request of another number of steps."""
    return max(1, min(steps, round(plan.full_steps * steps / planned)))
