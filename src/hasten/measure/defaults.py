"""The recipes that `compare` runs when none is named: the ladder from plain to too much."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import cast

from hasten.core.expression import load_recipe
from hasten.core.files import read_json
from hasten.core.recipe import Recipe
from hasten.core.resolve import resolve
from hasten.core.target import Target
from hasten.models import LoadedModel


def default_recipes(model: LoadedModel) -> list[tuple[str, Recipe]]:
    """The ladder for this model: its own if it is bundled, otherwise that of its kind of denoiser.

    Recipes that cannot run here are left out of a ladder that nobody asked for.
    """
    target = Target.of(model.pipeline)
    ladders = _ladders()
    kind = "unet" if target.denoisers[0].spec.unet else "transformer"
    ladder = [(text, load_recipe(text)) for text in ladders.get(model.name, ladders[kind])]
    return [(text, recipe) for text, recipe in ladder if not resolve(recipe, target).refusals]


@cache
def _ladders() -> dict[str, list[str]]:
    file = resources.files("hasten") / "data" / "default_recipes.json"
    with resources.as_file(file) as path:
        return cast("dict[str, list[str]]", read_json(path))
