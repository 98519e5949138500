"""Dynamic programming over which steps to compute in full: the best schedule for every number of full steps at once.

The cost of a segment depends on the full steps before it, as a forecast does. A state therefore is the newest full
step with the gaps back to the `depth` full steps before it: depth 1 suffices for rules of order 1, 2 for order 2.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from hasten.cache.engine.records import Floats
from hasten.cache.planning.segments import Ints


@dataclass(frozen=True)
class Schedule:
    """Full steps with the least total cost, and the index of each of its segments in the table of costs."""

    compute: tuple[int, ...]
    cost: float
    segments: tuple[tuple[int, ...], ...]


def schedules(costs: Floats) -> dict[int, Schedule]:
    """The best schedule for every number of full steps that the table's gaps allow.

    `costs` has the shape that `hasten.cache.planning.costs` describes. Of equally good schedules the one with the
    smallest gaps at the end is taken, so that the result does not depend on the machine.
    """
    steps, depth = costs.shape[0], costs.ndim - 2
    value = np.full(costs.shape[:-1], np.inf)
    value[(0,) * (depth + 1)] = 0.0
    choices: list[Ints] = []
    found: dict[int, Schedule] = {}
    for full in range(1, steps + 1):
        total = value[..., None] + costs
        end = _best_end(total)
        if end is not None:
            found[full] = _traced(end, float(total[end]), choices)
        choices.append(total.argmin(axis=depth))
        value = _moved(total.min(axis=depth))
    return found


def schedule_cost(costs: Floats, compute: tuple[int, ...]) -> float:
    """The total cost of given full steps; infinite when a gap is wider than the table."""
    indices = segment_indices(compute, costs.shape[0], costs.ndim - 2)
    span = costs.shape[-1]
    if any(max(index[1:-1], default=0) > span or index[-1] >= span for index in indices):
        return float("inf")
    return float(sum(costs[index] for index in indices))


def segment_indices(compute: tuple[int, ...], steps: int, depth: int) -> list[tuple[int, ...]]:
    """Where the segments of a schedule stand in a table of costs."""
    indices: list[tuple[int, ...]] = []
    for number, (start, end) in enumerate(zip(compute, (*compute[1:], steps), strict=True)):
        history = compute[max(0, number - depth) : number + 1][::-1]
        gaps = [newer - older for newer, older in itertools.pairwise(history)]
        indices.append((start, *gaps, *[0] * (depth - len(gaps)), end - start - 1))
    return indices


def _best_end(total: Floats) -> tuple[int, ...] | None:
    """The cheapest last segment: the one that ends at node T."""
    steps, span = total.shape[0], total.shape[-1]
    first = max(0, steps - span)
    starts = np.arange(first, steps)[::-1]
    last = np.stack([total[i, ..., steps - i - 1] for i in starts])
    place = np.unravel_index(int(last.argmin()), last.shape)
    if not np.isfinite(last[place]):
        return None
    start = int(starts[place[0]])
    return (start, *map(int, place[1:]), steps - start - 1)


def _moved(value: Floats) -> Floats:
    """From the best cost of (i, gaps but the oldest, c) to that of the state at i+c whose newest gap is c."""
    steps, span = value.shape[0], value.shape[-1]
    moved = np.full((steps, span + 1, *value.shape[1:-1]), np.inf)
    for gap in range(1, min(span, steps - 1) + 1):
        moved[gap:, gap] = value[: steps - gap, ..., gap - 1]
    return moved


def _traced(end: tuple[int, ...], cost: float, choices: list[Ints]) -> Schedule:
    """Walk back from the last segment to step 0."""
    segments = [end]
    for choice in reversed(choices):
        start, newest, *older = segments[-1][:-1]
        before = (start - newest, *older)
        oldest = int(choice[(*before, newest - 1)])
        segments.append((*before, oldest, newest - 1))
    segments.reverse()
    return Schedule(tuple(segment[0] for segment in segments), cost, tuple(segments))
