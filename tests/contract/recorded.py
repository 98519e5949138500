"""The form in which outcomes of combinations are recorded: what can be derived is left out."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

Names = tuple[str, ...]
Reasons = tuple[str, ...]
"""The sentences against a combination; none where it applies."""


def recorded(outcomes: Mapping[Names, Reasons]) -> dict[str, Any]:
    """The table of one architecture.

    `alone`: technique -> why it refuses. `together`: sentence -> first -> the seconds, for what is said only of the
    pair. `three`: first -> the two others, for combinations of three that apply. A pair that is not listed applies
    where both of its parts do.
    """
    together: dict[str, dict[str, list[str]]] = {}
    for names, sentence in _of_pairs(outcomes):
        seconds = together.setdefault(_general(sentence, *names), {}).setdefault(names[0], [])
        seconds.append(names[1])
    three: dict[str, list[str]] = {}
    for first, *others in (names for names in outcomes if len(names) == 3):
        three.setdefault(first, []).append(" + ".join(others))
    alone = {names[0]: " ".join(reasons) for names, reasons in outcomes.items() if len(names) == 1 and reasons}
    return {"alone": alone, "together": together, "three": three}


def _of_pairs(outcomes: Mapping[Names, Reasons]) -> Iterable[tuple[Names, str]]:
    for names, reasons in outcomes.items():
        if len(names) == 2:
            known = {sentence for one in names for sentence in outcomes[(one,)]}
            yield from ((names, sentence) for sentence in reasons if sentence not in known)


def _general(sentence: str, first: str, second: str) -> str:
    return re.sub(rf"\b{second}\b", "{second}", re.sub(rf"\b{first}\b", "{first}", sentence))


def refused_pairs(table: Mapping[str, Any]) -> dict[tuple[str, str], str]:
    """The pairs that an architecture's table refuses though it takes either part alone, and the general sentence."""
    return {
        (first, second): sentence
        for sentence, pairs in table["together"].items()
        for first, seconds in pairs.items()
        for second in seconds
        if not {first, second} & table["alone"].keys()
    }


def restricted(table: Mapping[str, Any], pairs: Collection[Names]) -> dict[str, Any]:
    """What an architecture's table says of single techniques and of some pairs."""
    kept = {
        sentence: {
            first: [second for second in seconds if (first, second) in pairs] for first, seconds in found.items()
        }
        for sentence, found in table["together"].items()
    }
    without_empty = {
        sentence: {f: seconds for f, seconds in found.items() if seconds} for sentence, found in kept.items()
    }
    return {"alone": table["alone"], "together": {s: found for s, found in without_empty.items() if found}, "three": {}}


def threes(table: Mapping[str, Any]) -> list[Names]:
    """The combinations of three that apply on an architecture."""
    return [(first, *others.split(" + ")) for first, rest in table["three"].items() for others in rest]


def verdict(pair: Names, tables: Iterable[Mapping[str, Any]]) -> str:
    """`yes` or `no` where all tables that take both parts alone agree, else `some`; `-` where none takes both."""
    found = {pair in refused_pairs(table) for table in tables if not set(pair) & table["alone"].keys()}
    if len(found) == 1:
        return "no" if found.pop() else "yes"
    return "some" if found else "-"


def pairs_of(names: Iterable[str]) -> list[Names]:
    """All pairs, in order."""
    return list(itertools.combinations(names, 2))
