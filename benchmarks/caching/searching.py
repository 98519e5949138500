"""Finds the threshold at which a method takes a given mean number of full steps on the calibration prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from harness import Bench, mean_full_steps
from isolation import isolated
from methods import Method, Search, Setting

TOLERANCE = 0.3
MOST_TRIALS = 9


def bisected(bench: Bench, method: Method, search: Search, setting: Setting, known: dict[str, float]) -> dict[str, Any]:
    """Parameters whose mean number of full steps is within `TOLERANCE` of the budget, or as near as it gets."""
    for rung in search.ladder:
        base = {**setting.values, **rung}

        def full_steps(threshold: float, base: dict[str, Any] = base, rung: Any = rung) -> float:
            key = f"{sorted(rung.items())} {threshold:.6g}"
            if key not in known:
                tried = replace(setting, values={**base, search.parameter: threshold})
                known[key] = isolated(mean_full_steps, bench, method, tried)
            return known[key]

        if full_steps(search.high) <= setting.budget + TOLERANCE:
            break
    seen = {
        float(key.rpartition(" ")[2]): count
        for key, count in known.items()
        if key.startswith(str(sorted(rung.items())))
    }
    return {**base, search.parameter: crossing(full_steps, setting.budget, search.low, search.high, seen)}


def crossing(
    count: Callable[[float], float], budget: float, low: float, high: float, seen: dict[float, float]
) -> float:
    """Bisect on a logarithmic scale where `count` falls through the budget; begins between the nearest ones seen."""
    low = max([value for value, full in seen.items() if full > budget], default=low)
    high = min([value for value, full in seen.items() if full <= budget and value > low], default=high)
    best = min(seen, key=lambda value: abs(seen[value] - budget))
    miss = abs(seen[best] - budget)
    for _ in range(MOST_TRIALS):
        if miss <= TOLERANCE:
            break
        middle = math.sqrt(low * high)
        full = count(middle)
        if abs(full - budget) < miss:
            best, miss = middle, abs(full - budget)
        low, high = (middle, high) if full > budget else (low, middle)
    return float(f"{best:.6g}")
