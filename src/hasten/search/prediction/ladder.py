"""The ladder: recipes that a plan looks at, as data; what gains speed and what saves memory, each with its price."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, cast

from hasten.core.errors import HastenError, UnknownName, nearest
from hasten.core.expression import load_recipe
from hasten.core.files import read_json
from hasten.core.recipe import Recipe
from hasten.search.prediction.devices import Device

NEEDS = ("", "float8")
"""What a rung may need of a device."""


@dataclass(frozen=True)
class Rung:
    """A recipe to look at, and what it gives up in words."""

    recipe: Recipe
    gives_up: str = ""
    needs: str = ""
    """"float8": only for devices that multiply 8-bit floats."""

    def __or__(self, other: Rung) -> Rung:
        """Both together."""
        told = "; ".join(filter(None, (self.gives_up, other.gives_up)))
        return Rung(self.recipe | other.recipe, told, self.needs or other.needs)

    def suits(self, device: Device) -> bool:
        """Does the device have what the recipe needs?"""
        return device.float8 or self.needs != "float8"


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
        if (needs := entry.get("needs", "")) not in NEEDS:
            raise HastenError(f"A rung of a ladder cannot need {needs!r}. {nearest(str(needs), NEEDS[1:])}")
        try:
            yield Rung(load_recipe(entry["recipe"]), entry["gives_up"], needs)
        except UnknownName:
            continue
