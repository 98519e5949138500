"""Updates, paths and segment errors against schedulers and against plain integration of the vectors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler

from hasten.cache.engine.records import Floats, Grid, Prediction, SeedRecord, Solver
from hasten.cache.engine.rules import QUANTITIES, VARIABLES, Rule, weights
from hasten.cache.planning.path import Path, Update, path_of
from hasten.cache.planning.segments import lagrange, segment_error
from tests.cache.planning.simulation import Mixture, Simulation, Snapshot, flow_grid, noise, recorded

FIELD = Mixture()
T = 10


def variance_preserving(prediction: Prediction, solver: Solver = "euler") -> Grid:
    angle = np.linspace(1.5, 0, T + 1)
    alpha, sigma = tuple(np.cos(angle).tolist()), tuple(np.sin(angle).tolist())
    return Grid(alpha=alpha, sigma=sigma, prediction=prediction, solver=solver)


GRIDS = {
    "flow": flow_grid(T),
    "flow 2M": flow_grid(T).model_copy(update={"solver": "dpmpp_2m"}),
    "epsilon": variance_preserving("epsilon"),
    "v": variance_preserving("v_prediction"),
    "v 2M": variance_preserving("v_prediction", "dpmpp_2m"),
    "sample": variance_preserving("sample"),
}


def by_hand(path: Path, compute: tuple[int, ...], number: int, rule: Rule, nodes: tuple[int, ...]) -> Floats:
    """Landing error of one segment from integrating real vectors; a memory of 2M shows in the step behind."""
    simulation, end = Simulation(FIELD, path.grid), (*compute[1:], T)[number]
    seen: list[Snapshot] = [(node, path.states[node], path.velocities[node]) for node in nodes]
    start = compute[number]
    before = path.clean[start - 1] if start else np.zeros_like(path.states[0])
    state, memory = simulation.walk((path.states[start], before), path.velocities[start], (start, end), rule, seen)
    if end == T:
        return state - path.states[T]
    update = Update.of(path.grid)
    # The next step with the true x0, compared with the recorded one, as an error of the state before that step.
    following = update.gain[end] * state + update.now[end] * path.clean[end] + update.before[end] * memory
    return (following - path.states[end + 1]) / update.gain[end] if update.gain[end] else state - path.states[end]


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_segment_errors_are_those_of_integrating_the_vectors(name: str, order: int) -> None:
    path = recorded(FIELD, GRIDS[name], noise(0))
    for quantity in QUANTITIES:
        for variable in VARIABLES:
            rule = Rule(quantity, variable, order)
            for compute, number in (((0, 1, 3, 7), 2), ((0, 4), 0), ((0, 4), 1), ((0, 2, 5), 2)):
                error, predictor = segment_error(path, compute, number, rule)
                nodes = compute[: number + 1][-(order + 1) :]
                expected = by_hand(path, compute, number, rule, nodes)
                assert np.allclose(error, expected, rtol=1e-9, atol=1e-11 * np.linalg.norm(path.states[0]))
                assert np.array_equal(error, predictor)


@pytest.mark.parametrize("correct", [False, True])
def test_half_of_the_trust_makes_half_of_the_difference(correct: bool) -> None:
    path = recorded(FIELD, GRIDS["v"], noise(0))
    errors = [
        segment_error(path, (0, 1, 3, 7), 2, Rule("velocity", "index", 1, correct, trust)) for trust in (0, 0.5, 1)
    ]
    (_, held), (corrected, half), (fully, full) = errors
    assert np.allclose(half, (held + full) / 2)
    assert not np.allclose(half, full)
    assert np.array_equal(corrected, fully) == correct, "what is interpolated does not depend on the guess"


@pytest.mark.parametrize("name", GRIDS)
def test_corrected_errors_use_the_output_at_the_end_of_the_gap(name: str) -> None:
    path = recorded(FIELD, GRIDS[name], noise(1))
    compute = (0, 1, 3, 7)
    for order, nodes in ((0, (3, 7)), (1, (3, 7)), (2, (1, 3, 7))):
        rule = Rule("clean", "flow_time", order, correct=True)
        error, predictor = segment_error(path, compute, 2, rule)
        assert np.allclose(error, by_hand(path, compute, 2, rule, nodes), rtol=1e-9, atol=1e-10)
        plain = Rule("clean", "flow_time", order)
        assert np.array_equal(predictor, segment_error(path, compute, 2, plain)[0])
        assert np.array_equal(segment_error(path, compute, 3, rule)[0], segment_error(path, compute, 3, plain)[0])


def test_a_record_knows_every_segment_error() -> None:
    path = recorded(FIELD, GRIDS["flow"], noise(2))
    vectors = np.vstack([path.states[:1], path.velocities])
    kept = path_of(path.grid, SeedRecord.of(vectors @ vectors.T, seed=2))
    for rule in (Rule("velocity", "index", 1), Rule("clean", "angle", 2, correct=True)):
        for number in range(3):
            true, found = (np.linalg.norm(segment_error(one, (0, 3, 5), number, rule)[0]) for one in (path, kept))
            assert found == pytest.approx(true, rel=1e-4)


@pytest.mark.parametrize("quantity", ["velocity", "clean"])
def test_holding_velocity_or_clean_sample_is_a_longer_step(quantity: Any) -> None:
    path = recorded(FIELD, GRIDS["flow"], noise(0))
    error, _ = segment_error(path, (0, 4), 0, Rule(quantity, "index", 0))
    s = path.flow_time
    assert np.allclose(error, path.states[0] + (s[4] - s[0]) * path.velocities[0] - path.states[4])


def test_vectorised_weights_are_the_rules_weights() -> None:
    nodes, at = np.array([[1.0, 3.0, 4.5], [0.2, 0.3, 0.9]]), np.array([6.0, 0.5])
    for row, place, found in zip(nodes, at, lagrange(nodes, at), strict=True):
        assert found == pytest.approx(weights(row.tolist(), float(place), 2))


def levels(scheduler: Any) -> Grid:
    """The grid of a scheduler with noise levels sigma/alpha or, for flows, s."""
    sigmas = scheduler.sigmas.double().numpy()
    flow = bool(scheduler.config.use_flow_sigmas)
    alpha = 1 - sigmas if flow else 1 / np.sqrt(1 + sigmas**2)
    sigma = sigmas if flow else sigmas * alpha
    prediction: Prediction = "flow_prediction" if flow else "epsilon"
    return Grid(alpha=tuple(alpha.tolist()), sigma=tuple(sigma.tolist()), prediction=prediction, solver="dpmpp_2m")


@pytest.mark.parametrize("flow", [False, True])
def test_the_multistep_update_is_that_of_the_scheduler(flow: bool) -> None:
    more: dict[str, Any] = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"} if flow else {}
    scheduler: Any = DPMSolverMultistepScheduler(**more)
    scheduler.set_timesteps(T)
    grid = levels(scheduler)
    s, scale = np.array(grid.flow_time), np.array(grid.alpha) + np.array(grid.sigma)
    sample = torch.tensor(noise(0))[None] * scale[0]
    start = sample[0].numpy() / scale[0]
    for k, timestep in enumerate(scheduler.timesteps):
        state = sample[0].double().numpy() / scale[k]
        velocity = FIELD.velocity(state, s[k])
        output = velocity if flow else state + (1 - s[k]) * velocity
        sample = scheduler.step(torch.tensor(output)[None], timestep, sample).prev_sample
    assert np.allclose(recorded(FIELD, grid, start).states[-1], sample[0].numpy() / scale[-1], atol=2e-5)


def test_euler_in_flow_time_is_ddim() -> None:
    scheduler: Any = DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(T)
    products = [float(scheduler.alphas_cumprod[t]) for t in scheduler.timesteps] + [1.0]
    alpha, sigma = np.sqrt(products), np.sqrt(1 - np.array(products))
    grid = Grid(alpha=tuple(alpha.tolist()), sigma=tuple(sigma.tolist()), prediction="epsilon")
    s, scale = np.array(grid.flow_time), alpha + sigma
    sample = torch.tensor(noise(0))[None]
    start = sample[0].numpy() / scale[0]
    for k, timestep in enumerate(scheduler.timesteps):
        state = sample[0].numpy() / scale[k]
        output = state + (1 - s[k]) * FIELD.velocity(state, s[k])
        sample = scheduler.step(torch.tensor(output)[None], timestep, sample).prev_sample
    assert np.allclose(recorded(FIELD, grid, start).states[-1], sample[0].numpy() / scale[-1], atol=1e-5)
