"""A plan file for another grid, made from the records of an existing one."""

from __future__ import annotations

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Grid, Plan, PlanKey
from hasten.cache.planning.planner import Planner
from hasten.cache.planning.regrid import regrid, regrid_gains


def replan(file: PlanFile, key: PlanKey, grid: Grid) -> PlanFile:
    """Plans for `grid`, described by `key`, from the recorded outputs of `file`: no new runs.

    The plans are not measured. Raises InvalidSetting where `grid` reaches too far outside of the recorded flow times.
    """
    records = tuple(regrid(record, file.grid, grid) for record in file.records)
    gains = regrid_gains(file.gains, file.grid, grid)
    made = PlanFile(key=key, grid=grid, gains=gains, records=records)
    return made.with_plans(standing_plans(planner_of(made)))


def planner_of(file: PlanFile) -> Planner:
    """The planner over the records of `file`."""
    return Planner.of(file.grid, file.records, file.gains)


def standing_plans(planner: Planner) -> tuple[Plan, ...]:
    """What a plan file holds before anything is measured, for each number of full steps.

    The plan of velocity rules, which is chosen; the plan with the least predicted error over all rules; and the
    uniform plan with the least predicted error.
    """
    found: list[Plan] = []
    steady = planner.steady.plans()
    for full_steps, plan in planner.plans().items():
        level = [one for rule in planner.rules if (one := planner.uniform(full_steps, rule)) is not None]
        found += sorted(level, key=lambda one: -(one.predicted_db or 0.0))[:1]
        found += [plan] if plan.rules != steady[full_steps].rules else []
        found.append(steady[full_steps].model_copy(update={"chosen": True}))
    return tuple(found)
