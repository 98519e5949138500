"""Tables of what every possible segment costs, for a rule or the best of several.

A table has shape (T, R+1, ..., R+1, R): step i, the gaps back to the `depth` full steps before i (newest first, 0 where
there is none), and the gap c to the next full step minus 1. Entries that cannot occur are infinite. A cost is

    gain[j]^2 * (|landing error|^2 + kappa^2 * |predictor error|^2), the second term for rules that correct,

because the output at node j is evaluated at the uncorrected state, so that part of the predictor's error stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.cache.engine.records import Floats
from hasten.cache.engine.rules import Rule
from hasten.cache.planning.path import Path
from hasten.cache.planning.segments import Forecast, Ints, corrector_nodes, predictor_nodes

KAPPA = 0.4
"""How much of the predictor's error stays after a correction, relative to the landing error (measured, small nets)."""


@dataclass(frozen=True)
class Group:
    """States with equally long history: `index` into the leading axes of a table; `history`, (n, h), newest last."""

    index: tuple[Ints, ...]
    history: Ints


@dataclass(frozen=True)
class Costs:
    """Segment costs along `path` with gaps up to `reach`; `gains`, (T+1,), weigh an error landing at each node."""

    path: Path
    gains: Floats
    depth: int = 1
    reach: int = 24
    kappa: float = KAPPA

    @property
    def span(self) -> int:
        """The largest gap between full steps that is looked at."""
        return min(self.reach, self.path.grid.steps)

    def table(self, rule: Rule) -> Floats:
        """Costs when every segment uses `rule`."""
        table = np.full((self.path.grid.steps, *[self.span + 1] * self.depth, self.span), np.inf)
        for group in self.groups():
            table[group.index] = self._group_costs(group.history, rule)
        return table

    def groups(self) -> list[Group]:
        """All states, grouped by how long their history is."""
        steps = self.path.grid.steps
        groups = [_group(np.zeros((1, 1), dtype=np.intp), self.depth)]
        for length in range(2, self.depth + 2):
            gaps = np.indices([self.span] * (length - 1)).reshape(length - 1, -1).T + 1  # newest first
            rows = [_histories(i, gaps, full=length == self.depth + 1) for i in range(1, steps)]
            history = np.concatenate([np.zeros((0, length), dtype=np.intp), *rows])
            if len(history):
                groups.append(_group(history, self.depth))
        return groups

    def _group_costs(self, history: Ints, rule: Rule) -> Floats:
        last = self.path.grid.steps
        ends = history[:, -1:] + np.arange(1, self.span + 1)
        squares = self._predicted(history, rule)
        if rule.correct:
            squares = np.where(ends < last, self._corrected(history, rule) + self.kappa**2 * squares, squares)
        weight = self.gains[np.minimum(ends, last)] ** 2
        return np.where(ends <= last, weight * squares, np.inf)

    def _predicted(self, history: Ints, rule: Rule) -> Floats:
        """Squared errors, (n, R), of plain forecasts at every gap."""
        nodes, back = np.unique(predictor_nodes(history, rule), axis=0, return_inverse=True)
        squares = np.zeros((len(nodes), self.span))
        ends = np.minimum(nodes[:, -1] + self.span, self.path.grid.steps)
        for landing in Forecast(self.path, rule.quantity, rule.variable, rule.trust).landings(
            nodes[:, -1], nodes, ends
        ):
            squares[landing.segments, landing.gap - 1] = _squared(landing.errors)
        return squares[back.reshape(-1)]

    def _corrected(self, history: Ints, rule: Rule) -> Floats:
        """Squared errors, (n, R), after correction through the output at the end of the gap; 0 where it has none."""
        gaps = np.tile(np.arange(1, self.span + 1), len(history))
        repeated = np.repeat(history, self.span, axis=0)
        ends = repeated[:, -1] + gaps
        inside = np.flatnonzero(ends < self.path.grid.steps)
        found = corrector_nodes(repeated[inside], ends[inside], rule)
        nodes, back = np.unique(found, axis=0, return_inverse=True)
        squares = np.zeros(len(nodes))
        for landing in Forecast(self.path, rule.quantity, rule.variable).landings(nodes[:, -2], nodes, nodes[:, -1]):
            last = nodes[landing.segments, -2] + landing.gap == nodes[landing.segments, -1]
            squares[landing.segments[last]] = _squared(landing.errors[last])
        result = np.zeros(len(gaps))
        result[inside] = squares[back.reshape(-1)]
        return result.reshape(len(history), self.span)


def _squared(errors: Floats) -> Floats:
    return np.einsum("nd,nd->n", errors, errors)


def lowest(tables: Sequence[Floats]) -> tuple[Floats, Ints]:
    """The lowest of several tables entry by entry, and the number of the table that has it; the first of equals."""
    best, which = tables[0], np.zeros(tables[0].shape, dtype=np.intp)
    for number, table in enumerate(tables[1:], start=1):
        better = table < best
        best, which = np.where(better, table, best), np.where(better, number, which)
    return best, which


def _group(history: Ints, depth: int) -> Group:
    gaps = np.diff(history[:, ::-1], axis=1) * -1
    padded = np.zeros((len(history), depth), dtype=np.intp)
    padded[:, : gaps.shape[1]] = gaps
    return Group((history[:, -1], *padded.T), history)


def _histories(newest: int, gaps: Ints, *, full: bool) -> Ints:
    """Histories that end at `newest`; those that are not `full` begin at step 0."""
    steps = newest - np.cumsum(np.column_stack([np.zeros(len(gaps), dtype=np.intp), gaps]), axis=1)
    oldest = steps[:, -1]
    return steps[oldest >= 0 if full else oldest == 0][:, ::-1]
