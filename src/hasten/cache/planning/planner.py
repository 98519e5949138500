"""From recorded outputs to plans: the best schedule and rules for every number of full steps, beside uniform ones."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from hasten.cache.engine.records import Floats, Goal, Grid, Plan, SeedRecord, Solver, SolverAnswer
from hasten.cache.engine.rules import VARIABLES, Quantity, Rule
from hasten.cache.planning.costs import Costs
from hasten.cache.planning.dynamic import schedule_cost, schedules
from hasten.cache.planning.nodes import solver_costs
from hasten.cache.planning.path import Path, path_of
from hasten.cache.planning.tables import Ruled, Tables
from hasten.core.errors import InvalidSetting

HOLD = Rule("velocity", "index", 0)
DEFAULT = Rule("velocity", "index", 1, correct=True)
"""The rule to use without any calibration."""
SHORT_REACH = 4
"""Widest gap in the search with rules of order 2, which are for half of the steps or more."""
FRACTIONS = (2, 3, 4, 5)
"""A seed's hold error is the mean of its errors with every second, third, fourth and fifth step held."""


def default_rules(grid: Grid, order: int = 1) -> tuple[Rule, ...]:
    """The useful rules of `order`, for order 1 with hold in front.

    Correction is left out for epsilon and v (integrating epsilon again through new values is unstable), and for
    samplers with a memory of their own, which would have to be rewritten as well.
    """
    quantities: list[Quantity] = ["velocity", "clean"]
    if grid.prediction in ("epsilon", "v_prediction"):
        quantities.append("output")
    found = [
        Rule(quantity, variable, order, correct)
        for correct in ((False, True) if grid.solver == "euler" else (False,))
        for quantity in quantities
        for variable in VARIABLES
        if not (correct and quantity == "output")
    ]
    return (HOLD, *found, *_cautious(grid)) if order == 1 else tuple(found)


def _cautious(grid: Grid) -> tuple[Rule, ...]:
    """Half of the extrapolated change: predicted worse, and often better where outputs have left the recorded path."""
    plain = Rule("velocity", "index", 1, trust=0.5)
    return (plain, dataclasses.replace(plain, correct=True)) if grid.solver == "euler" else (plain,)


def uniform(steps: int, full_steps: int) -> tuple[int, ...]:
    """Full steps at equal intervals, the first among them: floor(k*steps/full_steps)."""
    return tuple(k * steps // full_steps for k in range(full_steps))


def neighbours(compute: Sequence[int], steps: int) -> tuple[tuple[int, ...], ...]:
    """All schedules in which one full step, not the first, is moved by one: for a local search by true errors."""
    taken = set(compute)
    return tuple(
        tuple(sorted((taken - {old}) | {new}))
        for old in compute[1:]
        for new in (old - 1, old + 1)
        if new not in taken and 0 < new < steps
    )


@dataclass(frozen=True, eq=False)
class Planner:
    """Plans from the records of several seeds, each with the same weight: its errors over its own hold error.

    `gains`, one per node, say how much of an error landing there arrives in the final sample. Costs are sums of
    squared landing errors along the recorded path (`costs`); gaps are at most `reach` steps wide.
    """

    grid: Grid
    records: tuple[SeedRecord, ...]
    gains: Floats
    rules: tuple[Rule, ...]
    reach: int = 24

    @classmethod
    def of(
        cls,
        grid: Grid,
        records: Sequence[SeedRecord],
        gains: Sequence[float] = (),
        rules: Sequence[Rule] | None = None,
    ) -> Planner:
        """Check the parts; without `gains` all are 1, without `rules` the default ones of order 1 and 2 are used."""
        if not records:
            raise InvalidSetting("A plan needs the record of at least one calibration run.")
        weights = np.array(gains if len(gains) else [1.0] * (grid.steps + 1), dtype=np.float64)
        if weights.shape != (grid.steps + 1,) or not (np.isfinite(weights) & (weights >= 0)).all():
            raise InvalidSetting(f"gains needs one finite number of at least 0 per node: {grid.steps + 1} of them.")
        allowed = (*default_rules(grid), *default_rules(grid, 2)) if rules is None else tuple(rules)
        if not any(rule.order < 2 for rule in allowed) or any(rule.order > 2 for rule in allowed):
            raise InvalidSetting("A plan needs a rule of order 0 or 1, may use order 2 as well, and never order 3.")
        return cls(grid, tuple(records), weights, allowed)

    def plans(self) -> dict[int, Plan]:
        """The plan with the least predicted error for every number of full steps that the reach allows."""
        return {full: self._plan(self._best(full), "dp") for full in sorted(self._wide.free)}

    @functools.cached_property
    def steady(self) -> Planner:
        """The planner with the rules for the velocity alone, or this one if it has no such rule of order 0 or 1.

        Forecasts of x0 are predicted too well: where the approximated state has left the path they react more. On
        mixtures of Gaussians, plans of velocity rules are equal at half of the steps and 3 to 7 dB better below,
        so that they are the ones to use unmeasured.
        """
        rules = tuple(rule for rule in self.rules if rule.quantity == "velocity")
        usable = rules != self.rules and any(rule.order < 2 for rule in rules)
        return dataclasses.replace(self, rules=rules) if usable else self

    def candidates(self, full_steps: int) -> tuple[Plan, ...]:
        """What is worth running for real: planned schedules, free or with one rule, and the uniform one with each.

        Ordered by predicted error, without repetitions. Predictions are optimistic, by 8 dB and more at a quarter of
        the steps, where uniform plans often win. Raises InvalidSetting for a number that cannot be planned.
        """
        self._check(full_steps)
        rules = self._usable(full_steps)
        planned = [self._best(full_steps), self._wide.free[full_steps], self.steady._best(full_steps)]
        planned += [found for rule in rules if (found := self._tables(rule).single(rule).get(full_steps))]
        plans = [self._plan(found, "dp") for found in planned]
        plans += [plan for rule in rules if (plan := self.uniform(full_steps, rule)) is not None]
        unique = {(plan.compute, plan.rules): plan for plan in reversed(plans)}
        return tuple(sorted(unique.values(), key=_merit))

    def uniform(self, full_steps: int, rule: Rule = DEFAULT) -> Plan | None:
        """The uniform plan with one rule; None where its gaps are wider than the planner looks."""
        return self.given(uniform(self.grid.steps, full_steps), rule)

    def given(self, compute: tuple[int, ...], rule: Rule) -> Plan | None:
        """The plan with these full steps and one rule; None where its gaps are wider than the planner looks."""
        cost = self._tables(rule).cost(rule, compute)
        return self._plan(Ruled(compute, (rule,) * len(compute), cost), "uniform") if math.isfinite(cost) else None

    def solver_candidates(
        self, steps: int, solver: Solver = "dpmpp_2m", goal: Goal = "converge"
    ) -> tuple[SolverAnswer, SolverAnswer]:
        """`steps` recorded nodes as the steps of `solver`, to meet the `goal` at the end: the best and uniform ones.

        Both are worth running for real. Raises InvalidSetting for a number of steps that cannot be planned.
        """
        self._check(steps)
        table, level = solver_costs(self.pooled, solver, goal, self.gains, self.reach), uniform(self.grid.steps, steps)
        best = schedules(table)[steps]
        return (
            self._answer(solver, goal, best.compute, best.cost, "dp"),
            self._answer(solver, goal, level, schedule_cost(table, level), "uniform"),
        )

    def _answer(
        self, solver: Solver, goal: Goal, nodes: tuple[int, ...], cost: float, origin: Literal["dp", "uniform"]
    ) -> SolverAnswer:
        times = tuple(self.grid.flow_time[node] for node in (*nodes, self.grid.steps))
        predicted = self._decibels(cost) if math.isfinite(cost) else None
        return SolverAnswer(
            solver=solver,
            goal=goal,
            origin=origin,
            steps=len(nodes),
            nodes=nodes,
            flow_time=times,
            predicted_db=predicted,
        )

    @functools.cached_property
    def pooled(self) -> Path:
        """One path whose squared errors are the mean over the seeds of their squared errors over hold errors."""
        scale = np.sqrt([hold * len(self.records) for hold, _ in self._seeds])
        stacked = np.vstack([record.basis() / one for record, one in zip(self.records, scale, strict=True)])
        return Path.of(self.grid, np.linalg.qr(stacked, mode="r"))

    @functools.cached_property
    def _seeds(self) -> list[tuple[float, float]]:
        """Hold error and energy of the final state of every seed."""
        return [self._hold_and_energy(path_of(self.grid, record)) for record in self.records]

    def _hold_and_energy(self, path: Path) -> tuple[float, float]:
        table = Costs(path, self.gains, reach=min(2 * max(FRACTIONS), self.grid.steps)).table(HOLD)
        counts = {max(1, -(-self.grid.steps // fraction)) for fraction in FRACTIONS}
        errors = [schedule_cost(table, uniform(self.grid.steps, count)) for count in sorted(counts)]
        energy = float(np.square(path.states[-1]).sum())
        return max(float(np.mean(errors)), 1e-12 * energy), energy

    @functools.cached_property
    def _wide(self) -> Tables:
        low = tuple(rule for rule in self.rules if rule.order < 2)
        return Tables(Costs(self.pooled, self.gains, reach=self.reach), low)

    @functools.cached_property
    def _short(self) -> Tables:
        return Tables(Costs(self.pooled, self.gains, depth=2, reach=SHORT_REACH), self.rules)

    def _tables(self, rule: Rule) -> Tables:
        return self._short if rule.order == 2 else self._wide

    def _usable(self, full_steps: int) -> tuple[Rule, ...]:
        return tuple(rule for rule in self.rules if rule.order < 2 or 2 * full_steps >= self.grid.steps)

    def _best(self, full_steps: int) -> Ruled:
        best = self._wide.free[full_steps]
        if any(rule.order == 2 for rule in self._usable(full_steps)):
            return min(best, self._short.free[full_steps], key=lambda found: found.cost)
        return best

    def _plan(self, found: Ruled, origin: Literal["dp", "uniform"]) -> Plan:
        rules = tuple(map(str, found.rules))
        predicted = self._decibels(found.cost)
        return Plan(full_steps=len(rules), compute=found.compute, rules=rules, origin=origin, predicted_db=predicted)

    def _decibels(self, cost: float) -> float | None:
        """Mean over the seeds of final sample over error; None for no error."""
        if cost <= 0:
            return None
        return float(np.mean([10 * math.log10(energy / hold) for hold, energy in self._seeds])) - 10 * math.log10(cost)

    def _check(self, full_steps: int) -> None:
        known = sorted(self._wide.free)
        if full_steps not in known:
            text = f"Between {known[0]} and {known[-1]} full steps of {self.grid.steps} can be planned"
            raise InvalidSetting(f"{text}, not {full_steps!r}.")


def _merit(plan: Plan) -> tuple[float, str, tuple[str, ...]]:
    return -math.inf if plan.predicted_db is None else -plan.predicted_db, plan.origin, plan.rules
