"""Short names for rows: recipes are usually named by their expression, which is too long for a chart."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hasten.measure.comparison import Row
from hasten.measure.report import formatting as fmt

_CALL = re.compile(r"(\w+)\(([^()|]*)\)")
_CLEAR = {"bits", "full_steps", "interval", "kind", "mask", "name", "plan", "speedup", "storage", "threshold", "type"}
"""Parameters whose value says enough when it is the only one: `SVDQuant 4` would be taken for bits, if it were not."""


def readable(name: str) -> str:
    """`A() | B(threshold=0.08)` as `A + B 0.08`; a name that is no such expression stays as it is."""
    return " + ".join(_words(name)) or fmt.one_line(name)


def labels(rows: Sequence[Row]) -> list[str]:
    """Readable names without what all recipes of several parts share: `A + B 0.08` becomes `+ B 0.08`."""
    shared = shared_words(rows)
    return [_without(row.name, shared) for row in rows]


def shared_words(rows: Sequence[Row]) -> list[str]:
    """The parts that all recipes of several parts have in common; what `+` stands for in a label."""
    recipes = [_words(row.name) for row in rows if row.kind == "recipe"]
    several = [words for words in recipes if len(words) > 1]
    if len(several) < 2:
        return []
    return [word for word in several[0] if all(word in words for words in several)]


def _without(name: str, shared: Sequence[str]) -> str:
    words = _words(name)
    kept = [word for word in words if word not in shared]
    if not kept or len(kept) == len(words):
        return readable(name)
    return "+ " + " + ".join(kept)


def _words(name: str) -> list[str]:
    """One readable word or two for each part of a recipe expression; nothing for any other text."""
    calls = [_CALL.fullmatch(part) for part in fmt.one_line(name).split(" | ")]
    return [_word(call[1], call[2]) for call in calls if call] if all(calls) else []


def _word(technique: str, arguments: str) -> str:
    pairs = [argument.partition("=") for argument in arguments.split(",") if argument.strip()]
    if len(pairs) == 1 and pairs[0][1] and pairs[0][0].strip() in _CLEAR:
        return f"{technique} {_bare(pairs[0][2])}"
    settings = ", ".join(f"{key.strip()} {_bare(value)}" if equals else key.strip() for key, equals, value in pairs)
    return f"{technique} {settings}".strip()


def _bare(value: str) -> str:
    return value.strip().strip("'\"")
