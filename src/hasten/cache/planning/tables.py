"""Segment costs of several rules, and the best schedules under them."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from hasten.cache.engine.records import Floats
from hasten.cache.engine.rules import Rule
from hasten.cache.planning.costs import Costs, lowest
from hasten.cache.planning.dynamic import Schedule, schedule_cost, schedules


@dataclass(frozen=True)
class Ruled:
    """Full steps with the rule of each gap, and the total cost."""

    compute: tuple[int, ...]
    rules: tuple[Rule, ...]
    cost: float


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of `rules`, made when first needed."""

    costs: Costs
    rules: tuple[Rule, ...]

    @functools.cached_property
    def free(self) -> dict[int, Ruled]:
        """For every number of full steps the best schedule with the best rule in each gap."""
        best, which = lowest([self._table(rule) for rule in self.rules])
        return {
            full: Ruled(found.compute, tuple(self.rules[which[segment]] for segment in found.segments), found.cost)
            for full, found in schedules(best).items()
        }

    def single(self, rule: Rule) -> dict[int, Ruled]:
        """For every number of full steps the best schedule if each gap uses `rule`."""
        return {full: _with(rule, found) for full, found in schedules(self._table(rule)).items()}

    def cost(self, rule: Rule, compute: tuple[int, ...]) -> float:
        """The total cost of a schedule in which each gap uses `rule`; infinite when a gap is wider than the table."""
        return schedule_cost(self._table(rule), compute)

    def _table(self, rule: Rule) -> Floats:
        if rule not in self._made:
            self._made[rule] = self.costs.table(rule)
        return self._made[rule]

    @functools.cached_property
    def _made(self) -> dict[Rule, Floats]:
        return {}


def _with(rule: Rule, found: Schedule) -> Ruled:
    return Ruled(found.compute, (rule,) * len(found.compute), found.cost)
