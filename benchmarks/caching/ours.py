"""hasten's own rows: recipe texts from ours.json with places for what brings them to a budget.

`{full_steps}` is the budget itself, `{interval}` the interval that comes nearest to it, `{threshold}` is bisected.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, cast

from methods import Candidates, Method, Search, Setting, exactly, intervals

import hasten
from hasten.core.expression import load_recipe
from hasten.core.files import read_json
from hasten.core.registry import techniques

HERE = Path(__file__).parent
TUNES: dict[str, Search | Candidates] = {"threshold": Search(), "interval": intervals, "full_steps": exactly}


def ours() -> list[Method]:
    """The rows whose techniques this version of hasten has."""
    rows = cast("dict[str, Any]", read_json(HERE / "ours.json"))["rows"]
    return [method_of(row["name"], row["recipe"]) for row in rows if known(row["recipe"])]


def method_of(name: str, recipe: str) -> Method:
    """A row from a recipe text; its first place says how it is brought to a budget."""
    places = re.findall(r"\{(\w+)\}", recipe)
    if not places or places[0] not in TUNES:
        raise SystemExit(f"{name}: the recipe {recipe!r} needs one of {{{'}, {'.join(TUNES)}}}.")
    return Method(name, "ours", partial(apply, recipe=recipe), TUNES[places[0]], detail=recipe)


def apply(pipeline: Any, setting: Setting, *, recipe: str) -> AbstractContextManager[Any]:
    """A session with the recipe filled in."""
    return hasten.accelerate(pipeline, load_recipe(filled(recipe, setting)))


def filled(recipe: str, setting: Setting) -> str:
    """The recipe with numbers in its places."""
    return recipe.format_map({"full_steps": setting.budget, **setting.values})


def known(recipe: str) -> bool:
    """Whether every technique that the text names exists."""
    return set(re.findall(r"(\w+)\(", recipe)) <= set(techniques())
