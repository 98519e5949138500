"""Recording a run, landing gains, other grids, and nodes for another solver."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch

from hasten.cache.engine.plan_file import PlanFile
from hasten.cache.engine.records import Goal, Grid, PlanKey, SeedRecord
from hasten.cache.planning.gains import interpolated_gains, landing_gain
from hasten.cache.planning.nodes import converged_states, solver_costs
from hasten.cache.planning.path import Path as SamplerPath
from hasten.cache.planning.planner import Planner
from hasten.cache.planning.recording import Recorder
from hasten.cache.planning.regrid import interpolation, regrid
from hasten.cache.planning.replan import planner_of, replan, standing_plans
from hasten.cache.planning.tables import Tables
from hasten.core.errors import BrokenOutput, InvalidSetting
from tests.cache.planning.simulation import Mixture, flow_grid, noise, recorded

FIELD = Mixture()
GRID = flow_grid(28)


def recorder(grid: Grid = GRID, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Recorder, SamplerPath]:
    path = recorded(FIELD, grid, noise(seed))
    made = Recorder(grid, torch.tensor(path.states[0], dtype=dtype).reshape(2, 3, 4))
    for velocity in path.velocities:
        made.add(torch.tensor(velocity, dtype=dtype).reshape(2, 3, 4))
    return made, path


@functools.cache
def records(steps: int = 28) -> tuple[SeedRecord, ...]:
    return tuple(recorder(flow_grid(steps), seed)[0].record(seed=seed) for seed in range(8))


def test_a_recorder_keeps_the_inner_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.cache.planning.recording.CHUNK", 7)
    made, path = recorder()
    vectors = np.vstack([path.states[:1], path.velocities])
    basis = made.record(seed=0).basis()
    assert np.allclose(basis.T @ basis, vectors @ vectors.T, rtol=1e-5, atol=1e-5)


def test_a_recorder_notices_another_sampler() -> None:
    made, path = recorder()
    assert made.discrepancy(torch.tensor(path.states[-1])) < 1e-6
    multistep = recorded(FIELD, GRID.model_copy(update={"solver": "dpmpp_2m"}), noise(0))
    assert made.discrepancy(torch.tensor(multistep.states[-1])) > 0.02
    half, _ = recorder(dtype=torch.bfloat16)
    assert half.discrepancy(torch.tensor(path.states[-1])) < 1e-2


def test_a_recorder_refuses_what_makes_no_record() -> None:
    made, path = recorder()
    with pytest.raises(InvalidSetting, match="28 steps, but one more"):
        made.add(torch.tensor(path.velocities[0]).reshape(2, 3, 4))
    short = Recorder(GRID, torch.zeros(4))
    with pytest.raises(InvalidSetting, match=r"shape \(5,\), the start \(4,\)"):
        short.add(torch.zeros(5))
    short.add(torch.zeros(4))
    with pytest.raises(InvalidSetting, match="1 of 28 outputs"):
        short.record(seed=0)
    broken = Recorder(flow_grid(1), torch.zeros(4))
    broken.add(torch.full((4,), torch.nan))
    with pytest.raises(BrokenOutput, match="NaN"):
        broken.record(seed=0)


def test_a_file_of_eight_seeds_is_small(tmp_path: Path) -> None:
    key = PlanKey(model="m", weights_sha256="0" * 64, scheduler="S", steps=28, width=64, height=64)
    file = PlanFile(key=key, grid=GRID, records=records(), gains=(1.0,) * 29)
    path = file.with_plans(standing_plans(planner_of(file))).save(tmp_path / "plan.json")
    assert path.stat().st_size < 100_000


def test_landing_gains() -> None:
    kick = torch.tensor([3.0, 4.0])
    assert landing_gain(torch.zeros(2), torch.tensor([0.0, 2.5]), kick) == pytest.approx(0.5)
    with pytest.raises(InvalidSetting, match="not zero"):
        landing_gain(torch.zeros(2), torch.zeros(2), torch.zeros(2))


def test_gains_between_measured_nodes() -> None:
    grid = flow_grid(4, shift=1.0)
    assert interpolated_gains(grid, {1: [3.0, 4.0], 3: [0.5]}) == pytest.approx(
        (12.5**0.5, 12.5**0.5, (12.5**0.5 + 0.5) / 2, 0.5, 1.0)
    )
    for wrong in ({}, {5: [1.0]}, {1: []}):
        with pytest.raises(InvalidSetting, match="nodes from 0 to 4"):
            interpolated_gains(grid, wrong)


def test_interpolation_is_exact_for_polynomials() -> None:
    nodes, at = np.array(flow_grid(12).flow_time[:-1]), np.linspace(0.99, 0.3, 9)
    for degree in (1, 2, 3):
        assert interpolation(nodes, at, degree) @ nodes**degree == pytest.approx(at**degree)
    assert interpolation(nodes, np.array([0.1]), 3) @ nodes == pytest.approx([0.1])


def test_the_same_grid_gives_the_same_record() -> None:
    again = regrid(records()[0], GRID, GRID)
    products = [one.basis().T @ one.basis() for one in (again, records()[0])]
    assert np.allclose(*products, atol=1e-4)


@pytest.mark.parametrize("full", [14, 9, 7])
def test_plans_from_another_step_count_are_nearly_native(full: int) -> None:
    fine = flow_grid(50)
    taken = Planner.of(GRID, [regrid(one, fine, GRID) for one in records(50)])
    native = Planner.of(GRID, records())
    plan = taken.plans()[full]
    tables: Tables = native._short if any("/2" in rule for rule in plan.rules) else native._wide
    spent = cost_of(tables, plan.compute, plan.rules)
    best = native._decibels(spent)
    assert best is not None
    predicted = native.plans()[full].predicted_db
    level = native.uniform(full)
    assert predicted is not None
    assert level is not None
    assert level.predicted_db is not None
    assert best > predicted - 4
    assert best > level.predicted_db + 3


def cost_of(tables: Tables, compute: tuple[int, ...], rules: tuple[str, ...]) -> float:
    from hasten.cache.engine.rules import parse_rule
    from hasten.cache.planning.dynamic import segment_indices

    places = segment_indices(compute, GRID.steps, tables.costs.depth)
    return sum(float(tables._table(parse_rule(rule))[place]) for place, rule in zip(places, rules, strict=True))


def test_a_later_start_begins_on_the_recorded_path() -> None:
    late = Grid(alpha=GRID.alpha[10:], sigma=GRID.sigma[10:])
    path = recorded(FIELD, GRID, noise(0))
    vectors = np.vstack([path.states[10:11], path.velocities[10:]])
    basis = regrid(records()[0], GRID, late).basis()
    assert np.allclose(basis.T @ basis, vectors @ vectors.T, atol=1e-4)


def test_flow_times_that_were_never_visited_are_refused() -> None:
    late = Grid(alpha=GRID.alpha[10:], sigma=GRID.sigma[10:])
    short = regrid(records()[0], GRID, late)
    with pytest.raises(InvalidSetting, match="too far outside"):
        regrid(short, late, GRID)


def test_replanning_a_file() -> None:
    key = PlanKey(model="m", weights_sha256="0" * 64, scheduler="S", steps=28, width=64, height=64)
    file = PlanFile(key=key, grid=GRID, records=records(), gains=tuple(np.linspace(0.5, 1, 29).tolist()))
    made = replan(file, key.model_copy(update={"steps": 20}), flow_grid(20, shift=2.0))
    assert made.grid.steps == 20
    assert len(made.gains) == 21
    assert made.choose(speedup=2).full_steps == 10
    assert all(plan.measured_psnr is None for plan in made.plans)


def test_the_converged_path_integrates_polynomials_exactly() -> None:
    grid = flow_grid(9)
    s = np.array(grid.flow_time)
    velocities = np.stack([s[:-1] ** 0, s[:-1]], axis=1)
    path = SamplerPath.of(grid, np.vstack([[2.0, 3.0], velocities]).T)
    expected = np.stack([2 + s - s[0], 3 + (s**2 - s[0] ** 2) / 2], axis=1)
    assert np.allclose(converged_states(path), expected)


def test_solver_costs_are_single_steps_of_the_solver() -> None:
    path = recorded(FIELD, GRID, noise(0))
    table = solver_costs(path, "dpmpp_2m", "reproduce", np.ones(29))
    nodes = (3, 7, 12)
    s = tuple(GRID.flow_time[node] for node in nodes)
    two = Grid(alpha=tuple(1 - one for one in s), sigma=s, solver="dpmpp_2m")
    # Two steps of the solver whose first one is made to arrive where the path is.
    first = (path.states[7] - s[1] / s[0] * path.states[3]) / (1 - s[1] / s[0])
    basis = np.stack([path.states[3], (path.states[3] - first) / s[0], path.velocities[7]])
    made = SamplerPath.of(two, basis.T)
    extra = path.clean[3] - first
    expected = made.states[2] + made.update.before[1] * extra - path.states[12]
    assert table[7, 4, 4] == pytest.approx(float(expected @ expected))
    assert table[7, 2, 0] > 0
    assert np.isinf(table[7, 8, 0])


@pytest.mark.parametrize(("steps", "lead"), [(14, 5), (9, 8), (7, 4)])
def test_chosen_nodes_beat_uniform_ones_on_the_way_to_convergence(steps: int, lead: float) -> None:
    converged = flow_grid(300).model_copy(update={"solver": "dpmpp_2m"})
    best, level = Planner.of(GRID, records()).solver_candidates(steps)
    starts = [noise(100 + seed) for seed in range(16)]
    errors = [
        np.mean([decibels(start, solver_grid(answer.flow_time), converged) for start in starts])
        for answer in (best, level)
    ]
    assert best.origin == "dp"
    assert best.flow_time[-1] == 0
    assert len(best.noise_to_signal) == steps + 1
    assert errors[0] > errors[1] + lead


@pytest.mark.parametrize("goal", ["reproduce", "converge"])
def test_the_goal_is_part_of_the_answer(goal: Goal) -> None:
    best, level = Planner.of(GRID, records()).solver_candidates(9, goal=goal)
    assert best.goal == level.goal == goal
    assert best.predicted_db is not None
    assert level.predicted_db is not None
    assert best.predicted_db > level.predicted_db


def solver_grid(times: tuple[float, ...]) -> Grid:
    return Grid(alpha=tuple(1 - one for one in times), sigma=times, solver="dpmpp_2m")


def decibels(start: np.ndarray, grid: Grid, reference: Grid) -> float:
    true, found = (recorded(FIELD, one, start).states[-1] for one in (reference, grid))
    return float(10 * np.log10(true @ true / ((found - true) @ (found - true))))
