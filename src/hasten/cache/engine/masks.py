"""Step masks: which steps of a request are computed, as published presets for any step count or written out.

The presets are those of cache-dit (step computation masks): runs of computed and of reused steps in turn, made
for 28 steps and for few-step models, stretched or cut to other step counts. They ship as `data/step_masks.json`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from importlib.resources import files
from itertools import zip_longest
from typing import Any, cast

from hasten.core.errors import InvalidSetting, nearest

PRESETS = ("slow", "medium", "fast", "ultra")
_MADE_FOR = 28

Runs = list[int]


def check_mask(name: str, mask: str) -> None:
    """Raise InvalidSetting unless `mask` is a preset or a text of ones and zeros, such as "1101"."""
    if mask not in PRESETS and (not mask or set(mask) - {"0", "1"}):
        choices = f"{nearest(mask, PRESETS)} Or write the steps out, 1 to compute and 0 to reuse, such as '1101'."
        raise InvalidSetting(f"{name}={mask!r} is no step mask. {choices}")


def mask_for(mask: str, steps: int) -> tuple[bool, ...] | None:
    """For each of `steps` steps whether it is computed; None when nothing is published for so few steps.

    A mask that is written out computes what lies beyond its end. A preset computes the last step.
    """
    if mask in PRESETS:
        return _preset(mask, steps)
    return tuple(step >= len(mask) or mask[step] == "1" for step in range(steps))


def computes(mask: str) -> Callable[[int, int | None], bool]:
    """Is a step computed? Where the number of steps is unknown or has no published mask, always."""

    def at(step: int, steps: int | None) -> bool:
        if mask not in PRESETS:
            return step >= len(mask) or mask[step] == "1"
        found = mask_for(mask, steps) if steps else None
        return found is None or step >= len(found) or found[step]

    return at


@functools.cache
def _preset(name: str, steps: int) -> tuple[bool, ...] | None:
    runs = _published(name, steps)
    if runs is None:
        return None
    computed, reused = list(runs[0]), list(runs[1])
    if steps > _MADE_FOR:
        _stretch(computed, reused, steps)
    _cut(computed, reused, steps)
    return (*_steps(computed, reused)[:-1], True)


def _published(name: str, steps: int) -> tuple[Runs, Runs] | None:
    for table in _tables():
        first, last = table["steps"]
        if first <= steps and (last is None or steps <= last):
            computed, reused = table["masks"][name]
            return computed, reused
    return None


@functools.cache
def _tables() -> list[dict[str, Any]]:
    text = files("hasten").joinpath("data", "step_masks.json").read_text("utf-8")
    return cast("list[dict[str, Any]]", json.loads(text)["tables"])


def _stretch(computed: Runs, reused: Runs, steps: int) -> None:
    """Lengthen the runs in turn until they cover `steps`, each time by about half its share of the growth."""
    growth = steps / _MADE_FOR * 0.5
    added = [[max(int(length * growth), 1) for length in runs] for runs in (computed, reused)]
    turns = min(len(computed), len(reused))
    while sum(computed) + sum(reused) < steps:
        for runs, index, length in _round(computed, reused, added, turns):
            runs[index] += length
            if sum(computed) + sum(reused) >= steps:
                break


def _round(computed: Runs, reused: Runs, added: list[Runs], turns: int) -> Iterator[tuple[Runs, int, int]]:
    for index in range(turns):
        yield computed, index, added[0][index]
        yield reused, index, added[1][index]
    yield computed, -1, 1


def _cut(computed: Runs, reused: Runs, steps: int) -> None:
    """Shorten the last run of each kind in turn until they cover no more than `steps`."""
    runs, others = reused, computed
    while sum(computed) + sum(reused) > steps:
        if runs:
            runs[-1] -= 1
            if not runs[-1]:
                runs.pop()
        runs, others = others, runs


def _steps(computed: Runs, reused: Runs) -> tuple[bool, ...]:
    pairs = zip_longest(computed, reused, fillvalue=0)
    return tuple(value for full, left in pairs for value in (*(True,) * full, *(False,) * left))
