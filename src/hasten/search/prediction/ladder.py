"""The ladder: recipes that a plan looks at, as data; what gains speed and what saves memory, each with its price."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from hasten.core.errors import HastenError, UnknownName
from hasten.core.expression import load_recipe
from hasten.core.files import read_json
from hasten.core.recipe import Recipe


@dataclass(frozen=True)
class Rung:
    """A recipe to look at, and what it gives up in words."""

    recipe: Recipe
    gives_up: str = ""

    def __or__(self, other: Rung) -> Rung:
        """Both together."""
        return Rung(self.recipe | other.recipe, "; ".join(filter(None, (self.gives_up, other.gives_up))))


@dataclass(frozen=True)
class Ladder:
    """Rungs that gain speed and rungs that save memory; every pair of them is looked at."""

    speed: tuple[Rung, ...]
    memory: tuple[Rung, ...]

    def rungs(self) -> list[Rung]:
        """All pairs, the plain pipeline first, none twice."""
        pairs = [saving | gaining for saving in self.memory for gaining in self.speed]
        return list({frozenset(rung.recipe): rung for rung in reversed(pairs)}.values())[::-1]


def ladder(file: Path | None = None) -> Ladder:
    """Read the ladder that comes with hasten, or another file of its form.

    Entries with techniques that this installation does not have are left out. Raises HastenError for other faults.
    """
    path = file or Path(str(resources.files("hasten"))) / "data" / "ladder.json"
    data = cast("dict[str, list[dict[str, Any]]]", read_json(path))
    try:
        return Ladder(tuple(_rungs(data["speed"])), tuple(_rungs(data["memory"])))
    except (KeyError, TypeError) as error:
        raise HastenError(f"{path}: a ladder has speed and memory, lists of recipe and gives_up ({error}).") from None


def _rungs(entries: Sequence[dict[str, Any]]) -> Iterable[Rung]:
    for entry in entries:
        try:
            yield Rung(load_recipe(entry["recipe"]), entry["gives_up"])
        except UnknownName:
            continue
