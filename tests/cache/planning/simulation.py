"""An exactly known denoiser in few dimensions, and a sampler that follows a plan in closed loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.cache.engine.records import Floats, Grid
from hasten.cache.engine.rules import Rule, position, weights
from hasten.cache.planning.path import Path, Update


class Mixture:
    """The posterior mean of x0 when the data are a mixture of equally wide Gaussians."""

    def __init__(self, dimension: int = 24, modes: int = 12, width: float = 0.5, seed: int = 0) -> None:
        drawn = np.random.default_rng(seed)
        self.means = drawn.standard_normal((modes, dimension))
        self.width = width

    def clean(self, state: Floats, s: float) -> Floats:
        """x0 given the state xh = (1-s)*x0 + s*noise."""
        variance = (1 - s) ** 2 * self.width**2 + s**2
        away = state - (1 - s) * self.means
        odds = -np.square(away).sum(axis=1) / (2 * variance)
        likely = np.exp(odds - odds.max())
        posterior = self.means + (1 - s) * self.width**2 / variance * away
        return likely @ posterior / likely.sum()

    def velocity(self, state: Floats, s: float) -> Floats:
        return (state - self.clean(state, s)) / s


def flow_grid(steps: int, shift: float = 3.0) -> Grid:
    """Rectified-flow times t shifted to shift*t/(1+(shift-1)*t)."""
    t = np.linspace(1, 0, steps + 1)
    s = shift * t / (1 + (shift - 1) * t)
    return Grid(alpha=tuple((1 - s).tolist()), sigma=tuple(s.tolist()))


def noise(seed: int, dimension: int = 24) -> Floats:
    return np.random.default_rng(1000 + seed).standard_normal(dimension)


def recorded(field: Mixture, grid: Grid, start: Floats, kick: tuple[int, Floats] | None = None) -> Path:
    """The uncached run; `kick` adds a vector to the state at a node."""
    vectors, state, before = [start], start, np.zeros_like(start)
    update = Update.of(grid)
    for k, s in enumerate(grid.flow_time[:-1]):
        if kick is not None and kick[0] == k:
            state = state + kick[1]
        clean = field.clean(state, s)
        vectors.append((state - clean) / s)
        state = update.gain[k] * state + update.now[k] * clean + update.before[k] * before
        before = clean
    return Path.of(grid, np.array(vectors).T)


def gains(field: Mixture, grid: Grid, starts: Sequence[Floats], size: float = 1e-3) -> Floats:
    """How much of a small random error at each node arrives in the final state: root mean square over `starts`."""
    result = np.ones(grid.steps + 1)
    drawn = np.random.default_rng(5)
    for node in range(1, grid.steps):
        ratios: list[float] = []
        for start in starts:
            kick = drawn.standard_normal(len(start)) * size
            final = [_final(field, grid, start, moved) for moved in (None, (node, kick))]
            ratios.append(float(np.linalg.norm(final[1] - final[0]) / np.linalg.norm(kick)))
        result[node] = np.sqrt(np.mean(np.square(ratios)))
    return result


def _final(field: Mixture, grid: Grid, start: Floats, kick: tuple[int, Floats] | None) -> Floats:
    state, update, before = start, Update.of(grid), np.zeros_like(start)
    for k, s in enumerate(grid.flow_time[:-1]):
        state = state + kick[1] if kick is not None and kick[0] == k else state
        clean = field.clean(state, s)
        state = update.gain[k] * state + update.now[k] * clean + update.before[k] * before
        before = clean
    return state


Snapshot = tuple[int, Floats, Floats]
"""A computed step: its index, the state at which it was evaluated, and the velocity there."""


@dataclass
class Simulation:
    """Runs a plan on a field: outputs are evaluated where the approximated state really is."""

    field: Mixture
    grid: Grid

    def final(self, start: Floats, compute: Sequence[int], rules: Sequence[Rule]) -> Floats:
        """The final state of the run from `start`."""
        state, before = start, np.zeros_like(start)
        velocity = self.field.velocity(start, self.grid.flow_time[0])
        seen: list[Snapshot] = [(0, start, velocity)]
        for i, end, rule in zip(compute, (*compute[1:], self.grid.steps), rules, strict=True):
            begun, first = (state, before), velocity
            state, before = self.walk(begun, first, (i, end), rule, seen[-(rule.order + 1) :])
            if end == self.grid.steps:
                break
            velocity = self.field.velocity(state, self.grid.flow_time[end])
            seen.append((end, state, velocity))
            if rule.correct and end > i + 1:
                kept = self.value(rule, seen[-1])
                state, before = self.walk(begun, first, (i, end), rule, seen[-(max(rule.order, 1) + 1) :])
                velocity = self.velocity(rule, kept, state, end)
        return state

    def walk(
        self,
        begun: tuple[Floats, Floats],
        velocity: Floats,
        segment: tuple[int, int],
        rule: Rule,
        nodes: list[Snapshot],
    ) -> tuple[Floats, Floats]:
        """Integrate a segment with values from the polynomial through `nodes`; returns state and last x0."""
        (state, before), update, places = begun, Update.of(self.grid), [self.place(rule, node[0]) for node in nodes]
        for m in range(*segment):
            if m > segment[0]:
                mix = weights(places, self.place(rule, m), len(nodes) - 1)
                value = np.sum([c * self.value(rule, node) for c, node in zip(mix, nodes, strict=True)], axis=0)
                velocity = self.velocity(rule, value, state, m)
            clean = state - self.grid.flow_time[m] * velocity
            state = update.gain[m] * state + update.now[m] * clean + update.before[m] * before
            before = clean
        return state, before

    def place(self, rule: Rule, step: int) -> float:
        return position(rule.variable, step, self.grid.alpha[step], self.grid.sigma[step])

    def value(self, rule: Rule, node: Snapshot) -> Floats:
        step, state, velocity = node
        clean = state - self.grid.flow_time[step] * velocity
        epsilon = state + (1 - self.grid.flow_time[step]) * velocity
        if self._is_clean(rule):
            return clean
        if rule.quantity == "velocity" or self.grid.prediction == "flow_prediction":
            return velocity
        return epsilon if self.grid.prediction == "epsilon" else self._v(clean, epsilon, step)

    def velocity(self, rule: Rule, value: Floats, state: Floats, step: int) -> Floats:
        """The velocity at `state` if the rule's quantity is `value` there."""
        s, alpha, sigma = self.grid.flow_time[step], self.grid.alpha[step], self.grid.sigma[step]
        if self._is_clean(rule):
            return (state - value) / s
        if rule.quantity == "velocity" or self.grid.prediction == "flow_prediction":
            return value
        if self.grid.prediction == "epsilon":
            return (value - state) / (1 - s)
        x = state * (alpha + sigma)  # x0 = (alpha*x - sigma*v)/(alpha^2+sigma^2)
        return (state - (alpha * x - sigma * value) / (alpha**2 + sigma**2)) / s

    def _is_clean(self, rule: Rule) -> bool:
        return rule.quantity == "clean" or (rule.quantity == "output" and self.grid.prediction == "sample")

    def _v(self, clean: Floats, epsilon: Floats, step: int) -> Floats:
        return self.grid.alpha[step] * epsilon - self.grid.sigma[step] * clean
