"""Chooses one of several sizes for each of many layers, so that a budget holds and the sum of errors is least."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hasten.core.errors import HastenError


@dataclass(frozen=True)
class Choice:
    """A way to keep a layer."""

    name: str
    size: float
    """What it takes of the budget."""
    error: float


def choose(layers: Mapping[str, Sequence[Choice]], budget: float) -> dict[str, Choice]:
    """One choice for each layer, together within the budget.

    From the smallest of each, the step with the greatest gain for its size is taken until nothing fits (on the convex
    hull of each layer's choices, which is optimal but for the last step); then whatever still fits is used up.
    Raises HastenError where not even the smallest fit.
    """
    hulls = {name: _hull(choices) for name, choices in layers.items()}
    taken = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].size for hull in hulls.values())
    if left < 0:
        raise HastenError(f"Even the smallest choices take {budget - left:.4g}, more than the budget of {budget:.4g}.")
    queue = [(-_rate(hull, 0), name) for name, hull in hulls.items() if len(hull) > 1]
    heapq.heapify(queue)
    while queue:
        _, name = heapq.heappop(queue)
        hull, place = hulls[name], taken[name]
        step = hull[place + 1].size - hull[place].size
        if step <= left:
            left -= step
            taken[name] = place + 1
            if place + 2 < len(hull):
                heapq.heappush(queue, (-_rate(hull, place + 1), name))
    return _used_up(layers, {name: hulls[name][place] for name, place in taken.items()}, left)


def _hull(choices: Sequence[Choice]) -> list[Choice]:
    """Those of which no mixture of two others is both smaller and better, smallest first."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda item: (item.size, item.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(one: Choice, other: Choice) -> float:
    return (one.error - other.error) / max(other.size - one.size, 1e-12)


def _rate(hull: Sequence[Choice], place: int) -> float:
    return _slope(hull[place], hull[place + 1])


def _used_up(layers: Mapping[str, Sequence[Choice]], chosen: dict[str, Choice], left: float) -> dict[str, Choice]:
    """Spend what is left on the single changes that gain most, also on choices that are not on the hull."""
    while True:
        fitting = [
            (chosen[name].error - choice.error, name, choice)
            for name, choices in layers.items()
            for choice in choices
            if 0 < choice.size - chosen[name].size <= left and choice.error < chosen[name].error
        ]
        if not fitting:
            return chosen
        _, name, best = max(fitting, key=lambda item: item[0])
        left -= best.size - chosen[name].size
        chosen[name] = best
