"""Spreads the pieces of a pipeline over devices in the order in which they run, so that few tensors change places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal

from hasten.core.errors import HastenError
from hasten.memory.engine.sizes import in_words

How = Literal["balanced", "balanced_low_0", "sequential"]


class TooLarge(HastenError):
    """The weights fit into no arrangement of these devices."""


def spread(sizes: Sequence[int], memory: Mapping[str, int], how: How) -> list[str]:
    """The device of each piece (sizes and memory in bytes); neighbours stay together as far as there is room.

    `balanced` gives every device the same share, as far as it has room; `balanced_low_0` leaves the first one as
    empty as it can; `sequential` fills one after the other. Raises TooLarge when they do not fit.
    """
    places, room = list(memory), list(memory.values())
    total = sum(sizes)
    shares = _shares(total, room, how)
    bounds, used = list(accumulate(shares)), [0] * len(places)
    chosen: list[str] = []
    begun = index = 0
    for size in sizes:
        middle = begun + size / 2
        index = max(index, next((i for i, bound in enumerate(bounds) if middle <= bound), len(places) - 1))
        fitting = [i for i in range(len(places)) if used[i] + size <= room[i]]
        if not fitting:
            raise _too_large(total, memory)
        index = next((i for i in fitting if i >= index), fitting[0])
        used[index] += size
        begun += size
        chosen.append(places[index])
    return chosen


def _shares(total: int, room: Sequence[int], how: How) -> list[float]:
    """Bytes meant for each device."""
    if how == "sequential":
        return [float(size) for size in room]
    if how == "balanced_low_0" and len(room) > 1:
        first = max(0, total - sum(room[1:]))
        return [float(first), *_even(total - first, room[1:])]
    return _even(total, room)


def _even(total: int, room: Sequence[int]) -> list[float]:
    """Equal shares; what a small device cannot take goes to the others."""
    shares, left = [0.0] * len(room), float(total)
    by_size = sorted(range(len(room)), key=lambda index: room[index])
    for place, index in enumerate(by_size):
        shares[index] = min(float(room[index]), left / (len(room) - place))
        left -= shares[index]
    return shares


def _too_large(total: int, memory: Mapping[str, int]) -> TooLarge:
    listed = ", ".join(f"{place} {in_words(size)}" for place, size in memory.items())
    return TooLarge(f"the weights take {in_words(total)}, and there is room for {listed}; Offload needs less memory.")
