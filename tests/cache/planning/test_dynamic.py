"""Dynamic programming against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.cache.engine.rules import Rule
from hasten.cache.planning.costs import Costs, lowest
from hasten.cache.planning.dynamic import schedule_cost, schedules, segment_indices
from hasten.cache.planning.path import Path
from hasten.cache.planning.segments import segment_error
from tests.cache.planning.simulation import Mixture, flow_grid, noise, recorded

T = 8
RULES = (
    Rule("velocity", "index", 0),
    Rule("velocity", "flow_time", 1),
    Rule("velocity", "index", 1, correct=True),
    Rule("clean", "angle", 1),
)
SECOND = (*RULES, Rule("velocity", "index", 2), Rule("clean", "index", 2, correct=True))
GAINS = np.linspace(0.3, 1.0, T + 1)


def every_schedule(full: int) -> list[tuple[int, ...]]:
    return [(0, *rest) for rest in itertools.combinations(range(1, T), full - 1)]


def segment_cost(path: Path, compute: tuple[int, ...], number: int, rule: Rule) -> float:
    error, predictor = segment_error(path, compute, number, rule)
    end = (*compute[1:], T)[number]
    corrected = rule.correct and end < T
    return float(GAINS[end] ** 2 * (error @ error + (0.16 * predictor @ predictor if corrected else 0)))


@pytest.mark.parametrize(("depth", "rules"), [(1, RULES), (2, SECOND)])
def test_the_best_schedule_is_found_for_every_budget(depth: int, rules: tuple[Rule, ...]) -> None:
    path = recorded(Mixture(), flow_grid(T), noise(0))
    costs = Costs(path, GAINS, depth=depth, kappa=0.4)
    table, which = lowest([costs.table(rule) for rule in rules])
    found = schedules(table)
    assert sorted(found) == list(range(1, T + 1))
    for full, best in found.items():
        totals = {
            compute: sum(
                min(segment_cost(path, compute, number, rule) for rule in rules) for number in range(len(compute))
            )
            for compute in every_schedule(full)
        }
        assert best.cost == pytest.approx(min(totals.values()), rel=1e-9, abs=1e-15)
        chosen = [rules[which[segment]] for segment in best.segments]
        spent = sum(segment_cost(path, best.compute, number, rule) for number, rule in enumerate(chosen))
        assert spent == pytest.approx(best.cost, rel=1e-9, abs=1e-15)


@settings(max_examples=30, deadline=None)
@given(
    steps=st.integers(min_value=1, max_value=7),
    depth=st.integers(min_value=1, max_value=2),
    span=st.integers(min_value=1, max_value=7),
    seed=st.integers(min_value=0, max_value=10**6),
)
def test_any_table_of_costs(steps: int, depth: int, span: int, seed: int) -> None:
    span = min(span, steps)
    table = np.random.default_rng(seed).random((steps, *[span + 1] * depth, span))
    found = schedules(table)
    for full in range(1, steps + 1):
        everything: list[tuple[int, ...]] = [(0, *rest) for rest in itertools.combinations(range(1, steps), full - 1)]
        totals: dict[tuple[int, ...], float] = {compute: schedule_cost(table, compute) for compute in everything}
        best = min(totals.values())
        if not np.isfinite(best):
            assert full not in found
            continue
        assert found[full].cost == pytest.approx(best)
        assert totals[found[full].compute] == pytest.approx(best)
        assert list(found[full].segments) == segment_indices(found[full].compute, steps, depth)


def test_equal_costs_give_the_same_schedule_again() -> None:
    table = np.zeros((6, 7, 6))
    assert schedules(table) == schedules(table.copy())


def test_computing_every_step_costs_nothing() -> None:
    path = recorded(Mixture(), flow_grid(T), noise(0))
    for rule in SECOND:
        assert schedule_cost(Costs(path, GAINS, depth=2).table(rule), tuple(range(T))) == 0


def test_a_short_reach_bounds_the_gaps() -> None:
    path = recorded(Mixture(), flow_grid(T), noise(0))
    found = schedules(Costs(path, GAINS, reach=2).table(RULES[0]))
    assert min(found) == T // 2
    assert all(np.diff((*one.compute, T)).max() <= 2 for one in found.values())
    assert schedule_cost(Costs(path, GAINS, reach=2).table(RULES[0]), (0, 4)) == np.inf


def test_one_step_can_be_planned() -> None:
    path = recorded(Mixture(), flow_grid(1), noise(0))
    table = Costs(path, np.ones(2)).table(RULES[1])
    assert schedules(table)[1].compute == (0,)
