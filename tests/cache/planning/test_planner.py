"""Plans in closed loop: outputs are evaluated where the cached sampler really is, on noise that was not recorded."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from hasten.cache.engine.records import Floats, Grid, Plan, SeedRecord, Solver
from hasten.cache.engine.rules import Rule
from hasten.cache.planning.planner import DEFAULT, HOLD, Planner, default_rules, neighbours, uniform
from hasten.cache.planning.replan import standing_plans
from hasten.cache.planning.segments import segment_error
from hasten.core.errors import InvalidSetting
from tests.cache.planning.simulation import Mixture, Simulation, flow_grid, gains, noise, recorded

FIELD = Mixture()
T = 28
GRID = flow_grid(T)


def record(grid: Grid, seed: int, scale: float = 1.0) -> SeedRecord:
    path = recorded(FIELD, grid, noise(seed))
    vectors = scale * np.vstack([path.states[:1], path.velocities])
    return SeedRecord.of(vectors @ vectors.T, seed=seed)


@functools.cache
def measured_gains() -> tuple[float, ...]:
    return tuple(gains(FIELD, GRID, [noise(seed) for seed in range(4)]).tolist())


@functools.cache
def planner() -> Planner:
    return Planner.of(GRID, [record(GRID, seed) for seed in range(8)], measured_gains())


@functools.cache
def unseen(solver: Solver) -> list[tuple[Floats, Floats]]:
    starts = [noise(100 + seed) for seed in range(12)]
    return [(start, recorded(FIELD, GRID.model_copy(update={"solver": solver}), start).states[-1]) for start in starts]


def decibels(plan: Plan | None, solver: Solver = "euler") -> float:
    """Mean over unseen noise of |final|/|error| in dB, from real runs with the plan."""
    assert plan is not None
    simulation, levels = Simulation(FIELD, GRID.model_copy(update={"solver": solver})), list[float]()
    for start, final in unseen(solver):
        error = simulation.final(start, plan.compute, plan.parsed_rules()) - final
        levels.append(float(np.log10(final @ final / max(error @ error, 1e-30))))
    return 10 * float(np.mean(levels))


def test_computing_every_step_is_the_plain_sampler() -> None:
    full = planner().plans()[T]
    assert full.compute == tuple(range(T))
    assert full.predicted_db is None
    assert decibels(full) > 250


@pytest.mark.parametrize(("full", "over_hold", "over_default"), [(14, 15, 0), (9, 15, 8), (7, 15, 5)])
def test_a_plan_beats_uniform_intervals(full: int, over_hold: float, over_default: float) -> None:
    planned = decibels(planner().steady.plans()[full])
    assert planned > decibels(planner().uniform(full, HOLD)) + over_hold
    assert planned > decibels(planner().uniform(full, DEFAULT)) + over_default


@pytest.mark.parametrize("full", [14, 9, 7])
def test_the_default_rule_beats_hold_without_any_plan(full: int) -> None:
    assert decibels(planner().uniform(full, DEFAULT)) > decibels(planner().uniform(full, HOLD)) + 5


def test_uniform_plans_with_every_rule_are_candidates() -> None:
    for full in (20, 14, 9, 5):
        level = uniform(T, full)
        found = planner().candidates(full)
        rules = {plan.rules[0] for plan in found if plan.origin == "uniform"}
        allowed = [rule for rule in planner().rules if rule.order < 2 or full >= T / 2]
        assert rules == {str(rule) for rule in allowed}
        assert all(plan.compute == level for plan in found if plan.origin == "uniform")
        assert len({(plan.compute, plan.rules) for plan in found}) == len(found)
        assert found[0].predicted_db == planner().plans()[full].predicted_db


def test_predictions_rank_candidates() -> None:
    found = planner().candidates(9)
    true = np.array([decibels(plan) for plan in found]).argsort().argsort()
    predicted = np.array([plan.predicted_db for plan in found]).argsort().argsort()
    assert np.corrcoef(true, predicted)[0, 1] > 0.6


def test_a_prediction_is_the_sum_of_landing_errors_against_the_final_sample() -> None:
    path, rule, weights = recorded(FIELD, GRID, noise(3)), Rule("clean", "index", 1), measured_gains()
    plan = Planner.of(GRID, [record(GRID, 3)], weights).uniform(9, rule)
    assert plan is not None
    landings = [segment_error(path, plan.compute, number, rule)[0] for number in range(9)]
    cost = sum(weights[end] ** 2 * (error @ error) for end, error in zip((*plan.compute[1:], T), landings, strict=True))
    final = path.states[-1]
    assert plan.predicted_db == pytest.approx(10 * np.log10(final @ final / cost), abs=0.05)


def test_second_order_is_kept_to_half_of_the_steps() -> None:
    plans = planner().plans()
    assert any("/2" in rule for full in range(14, T) for rule in plans[full].rules)
    assert not any("/2" in rule for full in range(2, 14) for rule in plans[full].rules)


def test_planning_again_gives_the_same() -> None:
    again = Planner.of(GRID, planner().records, measured_gains())
    assert again.plans() == planner().plans()


def test_every_seed_has_the_same_weight() -> None:
    small, large = record(GRID, 0), record(GRID, 1)
    plain = Planner.of(GRID, [small, large]).plans()
    scaled = Planner.of(GRID, [small, record(GRID, 1, scale=1000)]).plans()
    assert [plan.compute for plan in plain.values()] == [plan.compute for plan in scaled.values()]
    alone = Planner.of(GRID, [large]).plans()
    assert [plan.compute for plan in plain.values()] != [plan.compute for plan in alone.values()]


def test_gains_move_full_steps_to_where_errors_count() -> None:
    early = np.where(np.arange(T + 1) < T / 2, 0.01, 1.0)
    late = np.where(np.arange(T + 1) < T / 2, 1.0, 0.01)
    counts = [
        sum(step < T / 2 for step in Planner.of(GRID, planner().records, tuple(one.tolist())).plans()[9].compute)
        for one in (early, late)
    ]
    assert counts[0] + 2 <= counts[1]


def test_a_plan_for_the_wrong_sampler_is_worse() -> None:
    grid = GRID.model_copy(update={"solver": "dpmpp_2m"})
    rules = default_rules(grid)
    records = [record(grid, seed) for seed in range(8)]
    right = Planner.of(grid, records, rules=rules).plans()
    wrong = Planner.of(GRID, records, rules=rules).plans()
    lead = [decibels(right[full], "dpmpp_2m") - decibels(wrong[full], "dpmpp_2m") for full in (14, 11, 9, 7)]
    assert np.mean(lead) > 1


def test_rules_of_a_sampler_with_memory_do_not_correct() -> None:
    assert not any(rule.correct for rule in default_rules(GRID.model_copy(update={"solver": "dpmpp_2m"})))
    epsilon = default_rules(GRID.model_copy(update={"prediction": "epsilon"}))
    assert Rule("output", "angle", 1) in epsilon
    assert Rule("output", "angle", 1, correct=True) not in epsilon


def test_a_file_begins_with_a_chosen_plan_and_a_uniform_one() -> None:
    found = standing_plans(planner())
    assert [plan.full_steps for plan in found if plan.chosen] == list(range(2, T + 1))
    assert all(rule.startswith("velocity/") for plan in found if plan.chosen for rule in plan.rules)
    assert any("clean/" in rule for plan in found if plan.origin == "dp" for rule in plan.rules)
    assert [plan.full_steps for plan in found if plan.origin == "uniform"] == list(range(2, T + 1))


def test_neighbours_move_one_full_step() -> None:
    assert set(neighbours((0, 1, 4), 6)) == {(0, 2, 4), (0, 1, 3), (0, 1, 5)}


@pytest.mark.parametrize("full", [0, 1, T + 1])
def test_impossible_budgets_are_refused(full: int) -> None:
    with pytest.raises(InvalidSetting, match="Between 2 and 28 full steps of 28"):
        planner().candidates(full)


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidSetting, match="at least one calibration run"):
        Planner.of(GRID, [])
    with pytest.raises(InvalidSetting, match="29 of them"):
        Planner.of(GRID, planner().records, [1.0])
    with pytest.raises(InvalidSetting, match="never order 3"):
        Planner.of(GRID, planner().records, rules=[DEFAULT, Rule("clean", "index", 3)])
    with pytest.raises(InvalidSetting, match="20 steps needs 21 vectors, not 29"):
        Planner.of(flow_grid(20), planner().records).plans()
