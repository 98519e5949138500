"""Errors of forecast segments along a recorded path.

A segment i -> j computes step i in full and guesses steps i+1 .. j-1. With the history and the state at i taken from
the uncached path, its landing error, state reached at node j minus recorded state, is a linear combination of recorded
vectors, followed here as a recursion of error vectors d. With the quantity q = a*xh + b*u:

    du = (dq - a*dxh)/b,  dx0 = dxh - s*du,  dxh' = gain*dxh + now*dx0 + before*(dx0 one step earlier)

where dq is the forecast minus the recorded quantity. A two-step sampler carries the last dx0 over the landing: it is
added as the error of the state that has the same effect on the step after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hasten.cache.engine.records import Floats
from hasten.cache.engine.rules import Quantity, Rule, Variable
from hasten.cache.planning.path import Path

Ints = NDArray[np.intp]


def lagrange(nodes: Floats, at: Floats) -> Floats:
    """Coefficients, (n, h), of the polynomials through `nodes`, (n, h), evaluated at `at`, (n,)."""
    columns = range(nodes.shape[1])
    result = np.ones_like(nodes)
    for j in columns:
        for k in columns:
            if k != j:
                result[:, j] *= (at - nodes[:, k]) / (nodes[:, j] - nodes[:, k])
    return result


@dataclass(frozen=True)
class Landings:
    """Errors on arriving at nodes `i`+`gap`: `errors` (m, d) of the segments numbered `segments`, (m,)."""

    gap: int
    segments: Ints
    errors: Floats


@dataclass(frozen=True)
class Forecast:
    """Follows the errors of a quantity guessed along a variable, for many segments at once."""

    path: Path
    quantity: Quantity
    variable: Variable
    trust: float = 1.0

    def landings(self, starts: Ints, nodes: Ints, ends: Ints) -> Iterator[Landings]:
        """Yield the landing errors at gaps 2, 3, ... of segments that begin at `starts`, (n,).

        The guesses of segment n come from the polynomial through the outputs of steps `nodes`, (n, h).
        It is followed up to node `ends`[n] (at most T).
        """
        path, values, (a, b) = self.path, self.path.values(self.quantity), self.path.mixture(self.quantity)
        place, snapshots = path.positions(self.variable), values[nodes]
        active = np.arange(len(starts))
        state = np.zeros((len(starts), values.shape[1]))
        before = np.zeros_like(state)
        for gap in range(2, path.grid.steps + 1):
            keep = starts[active] + gap <= ends[active]
            active, state, before = active[keep], state[keep], before[keep]
            if not len(active):
                return
            step = starts[active] + gap - 1
            mix = self.trust * lagrange(place[nodes[active]], place[step])
            mix[:, -1] += 1 - self.trust
            wrong = np.einsum("nh,nhd->nd", mix, snapshots[active]) - values[step]
            clean = self._clean_error(state, wrong, step, a, b)
            state, before = self._advance(state, clean, before, step), clean
            yield Landings(gap, active, state + self._carried(step + 1) * clean)

    def _clean_error(self, state: Floats, wrong: Floats, step: Ints, a: Floats, b: Floats) -> Floats:
        s = self.path.flow_time[step]
        ratio = s / b[step]
        return (1 + a[step] * ratio)[:, None] * state - ratio[:, None] * wrong

    def _advance(self, state: Floats, clean: Floats, before: Floats, step: Ints) -> Floats:
        update = self.path.update
        gain, now, earlier = update.gain[step, None], update.now[step, None], update.before[step, None]
        return gain * state + now * clean + earlier * before

    def _carried(self, node: Ints) -> Floats:
        """What the last clean error counts for in the step behind the landing, as an error of the state: (n, 1)."""
        update = self.path.update
        ratio = np.divide(update.before, update.gain, out=np.zeros_like(update.gain), where=update.gain > 0)
        return np.append(ratio, 0.0)[node, None]


def predictor_nodes(history: Ints, rule: Rule) -> Ints:
    """The steps a forecast uses: the newest `order`+1 of `history`, (n, h), newest last; all when fewer."""
    return history[:, -(rule.order + 1) :]


def corrector_nodes(history: Ints, ends: Ints, rule: Rule) -> Ints:
    """The steps an interpolation uses: the newest max(`order`, 1) of `history`, and the segments' ends."""
    return np.column_stack([history[:, -max(rule.order, 1) :], ends])


def segment_error(path: Path, compute: tuple[int, ...], number: int, rule: Rule) -> tuple[Floats, Floats]:
    """Landing error and predictor error, each (d,), of segment `number` of a plan with full steps `compute`.

    They are the same unless the rule corrects. The last segment ends at node T, where nothing can be corrected.
    """
    start, steps = compute[number], path.grid.steps
    end = compute[number + 1] if number + 1 < len(compute) else steps
    history, starts, ends = np.array([compute[: number + 1]]), np.array([start]), np.array([end])
    forecast = Forecast(path, rule.quantity, rule.variable, rule.trust)
    predicted = _last(forecast.landings(starts, predictor_nodes(history, rule), ends), path)
    if not rule.correct or end == steps:
        return predicted, predicted
    between = Forecast(path, rule.quantity, rule.variable)
    return _last(between.landings(starts, corrector_nodes(history, ends, rule), ends), path), predicted


def _last(landings: Iterator[Landings], path: Path) -> Floats:
    error = np.zeros(path.states.shape[1])
    for landing in landings:
        error = landing.errors[0]
    return error
