"""Fits TeaCache's polynomial, and works out what a threshold does on recorded runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hasten.cache.engine.model_data import TeaCacheSet
from hasten.cache.tea_cache import Polynomial, compulsory
from hasten.search.recording import Request

DEGREE = 4
"""Degree of the polynomial, as published."""
_HALVINGS = 40


def fit(pairs: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], float]:
    """Least-squares polynomial through (change of indicator, change of output): coefficients, and R^2.

    Coefficients come with the highest power first. R^2 is the share of the variance that the polynomial explains.
    """
    x, y = np.array(pairs, dtype=np.float64).T
    found = np.polynomial.Polynomial.fit(x, y, DEGREE)
    residual, total = float(((y - found(x)) ** 2).sum()), float(((y - y.mean()) ** 2).sum())
    ascending = np.zeros(DEGREE + 1)
    plain = found.convert().coef
    ascending[: len(plain)] = plain
    return tuple(float(one) for one in ascending[::-1]), 1.0 - residual / total if total else 1.0


def lowest(chosen: TeaCacheSet) -> float:
    """The smallest change that the polynomial predicts within its range."""
    predict, ends = Polynomial(chosen), chosen.range or (0.0, 1.0)
    return min(predict(float(change)) for change in np.linspace(*ends, 400))


def share(chosen: TeaCacheSet, requests: Sequence[Request], threshold: float) -> float:
    """Mean share of the steps that the threshold would have computed, had reuse changed nothing else."""
    predict = Polynomial(chosen)
    counts = [_computed(chosen, predict, request, threshold) / len(request) for request in requests]
    return sum(counts) / len(counts)


def _computed(chosen: TeaCacheSet, predict: Polynomial, request: Request, threshold: float) -> int:
    sums: list[float] = []
    count = 0
    for record in request:
        changes = record.indicator or ()
        before = sums if len(sums) == len(changes) else [0.0] * len(changes)
        sums = [total + predict(change) for total, change in zip(before, changes, strict=True)]
        forced = compulsory(record.step, len(request), chosen.first, chosen.last)
        if forced or not sums or max(sums) >= threshold:
            count, sums = count + 1, []
    return count


def threshold_for(chosen: TeaCacheSet, requests: Sequence[Request], wanted: float) -> float:
    """The smallest threshold, nearly, that computes at most the wanted share of the steps."""
    low, high = 0.0, 1.0
    while share(chosen, requests, high) > wanted and high < 1e4:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if share(chosen, requests, middle) <= wanted else (middle, high)
    return high
