"""Which plans are worth trying for real, and what follows for the budgets that are not tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hasten.cache.engine.course import BEND, graded
from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Plan
from hasten.cache.engine.rules import Rule
from hasten.cache.planning.planner import Planner

FRACTIONS = (2, 3, 4, 5)
"""Tried are budgets of these fractions of the steps."""
PLAIN = Rule("velocity", "index", 1)
RULES = (
    PLAIN,
    Rule("velocity", "index", 1, trust=0.5),
    Rule("velocity", "index", 1, correct=True),
    Rule("velocity", "index", 1, correct=True, trust=0.5),
    Rule("velocity", "index", 2, correct=True),
    Rule("velocity", "index", 0),
)
"""Single rules that are tried, with planned and with uniform steps."""

GRADED_RULES = (RULES[3], RULES[2], RULES[1])
"""Rules that are tried with the schedule that is used without calibration."""


def budgets(steps: int) -> tuple[int, ...]:
    """Numbers of full steps that are tried, most first."""
    found = {max(1, steps // fraction) for fraction in FRACTIONS}
    return tuple(sorted((count for count in found if 1 < count < steps), reverse=True))


def shortlist(planner: Planner, full_steps: int) -> Iterator[Plan]:
    """The planned and the uniform schedule with single rules, the uncalibrated one, and the best with mixed rules."""
    candidates = planner.candidates(full_steps)
    mixed = [plan for plan in candidates if len(set(plan.rules)) > 1]
    single = {(plan.origin, plan.rules[0]): plan for plan in candidates if len(set(plan.rules)) == 1}
    wanted = [(origin, str(rule)) for rule in RULES for origin in ("dp", "uniform")]
    even = [planner.given(graded(planner.grid.steps, full_steps, BEND), rule) for rule in GRADED_RULES]
    found = [*mixed[:1], *(plan for plan in even if plan), *(single[one] for one in wanted if one in single)]
    unique = {(plan.compute, plan.rules): plan for plan in reversed(found)}
    yield from reversed(unique.values())


def by_likeness(made: PlanFile, planner: Planner, winners: Mapping[int, Plan]) -> PlanFile:
    """For budgets that were not tried, choose the plan of the same kind as the winner of the nearest tried budget."""
    chosen: list[Plan] = []
    untried = {plan.full_steps for plan in made.plans} - set(winners)
    for full_steps in sorted(untried):
        nearest = winners[min(winners, key=lambda tried: (abs(tried - full_steps), tried))]
        alike = [plan for plan in planner.candidates(full_steps) if _kind(plan) == _kind(nearest)]
        chosen += [alike[0].model_copy(update={"chosen": True})] if alike else []
    replaced = {plan.full_steps for plan in chosen}
    kept = [plan for plan in made.plans if plan.full_steps not in replaced]
    return made.model_copy(update={"plans": tuple(kept)}).with_plans(chosen)


def _kind(plan: Plan) -> tuple[str, str]:
    rules = set(plan.rules)
    return plan.origin, rules.pop() if len(rules) == 1 else "mixed"
