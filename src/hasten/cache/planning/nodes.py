"""Fewer steps of a better solver, at calibrated noise levels: which of the recorded nodes should be its steps."""

from __future__ import annotations

import numpy as np

from hasten.cache.engine.records import Floats, Goal, Solver
from hasten.cache.planning.path import Path
from hasten.cache.planning.regrid import interpolation
from hasten.cache.planning.segments import Ints


def converged_states(path: Path) -> Floats:
    """States, (T+1, d), of the exact integral of the recorded outputs over flow time.

    Cubic interpolation of the outputs, three Gauss points per step; the last output is continued linearly to the
    end. The outputs remain those of the recorded run: record with many steps, or with a second-order solver.
    """
    s = path.flow_time
    points, shares = np.polynomial.legendre.leggauss(3)
    widths = np.diff(s)
    total = np.zeros((path.grid.steps, path.grid.steps))
    for point, share in zip(points, shares, strict=True):
        at = s[:-1] + widths * (1 + point) / 2
        total += share / 2 * widths[:, None] * interpolation(s[:-1], at)
    moves = total @ path.velocities
    return path.states[0] + np.vstack([np.zeros(moves.shape[1]), np.cumsum(moves, axis=0)])


def solver_costs(path: Path, solver: Solver, goal: Goal, gains: Floats, reach: int = 24) -> Floats:
    """Costs of a solver's steps between recorded nodes: a table of depth 1, as `schedules` takes it.

    A step i -> j after a step from i-a is (s_j/s_i)*xh_i + (1-s_j/s_i)*(x0_i + e*(x0_i - x0_(i-a))), with e = 0 for
    Euler, for the first step and for one to s = 0, else e = h/(2*h_before) in log(alpha/sigma) (DPM-Solver++(2M),
    arXiv:2211.01095). Its error is the distance from the target at j: the recorded states (`goal` "reproduce"),
    or those of the converged sampler ("converge").
    """
    steps, span = path.grid.steps, min(reach, path.grid.steps)
    states = path.states if goal == "reproduce" else converged_states(path)
    clean = states[:-1] - path.flow_time[:-1, None] * path.velocities
    table = np.full((steps, span + 1, span), np.inf)
    for before in range(span + 1):
        starts = np.arange(1) if before == 0 else np.arange(before, steps)
        for gap in range(1, span + 1):
            i = starts[starts + gap <= steps]
            error = _stepped(path.flow_time, states, clean, (i, i - before, i + gap), solver) - states[i + gap]
            table[i, before, gap - 1] = gains[i + gap] ** 2 * np.einsum("nd,nd->n", error, error)
    return table


def _stepped(s: Floats, states: Floats, clean: Floats, nodes: tuple[Ints, Ints, Ints], solver: Solver) -> Floats:
    i, p, j = nodes
    guess = clean[i]
    if solver == "dpmpp_2m":
        guess = guess + _extra(s, p, i, j)[:, None] * (clean[i] - clean[p])
    keep = (s[j] / s[i])[:, None]
    return keep * states[i] + (1 - keep) * guess


def _extra(s: Floats, p: Ints, i: Ints, j: Ints) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        lam = np.log((1 - s) / s)
        extra = (lam[j] - lam[i]) / (2 * (lam[i] - lam[p]))
    return np.where((p < i) & np.isfinite(extra), extra, 0.0)
