"""Hypothesis strategies that draw any technique with any valid settings."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hypothesis import strategies as st

from hasten.core.recipe import Recipe
from hasten.core.registry import techniques
from hasten.core.technique import Technique


def values(hint: Any, limits: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated type within a field's limits."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return st.one_of(*(values(argument, limits) for argument in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(values(arguments[0], {}), max_size=3).map(tuple)
    if origin is Mapping:
        return st.dictionaries(values(arguments[0], {}), values(arguments[1], {}), max_size=3)
    return _plain(hint, limits)


def _plain(hint: Any, limits: Any) -> st.SearchStrategy[Any]:
    low, high = limits.get("ge", limits.get("gt")), limits.get("le")
    if hint is float:
        return st.floats(low, high, allow_nan=False, allow_infinity=False, exclude_min="gt" in limits)
    if hint is int:
        return st.integers(low + ("gt" in limits) if low is not None else None, high)
    return {bool: st.booleans(), str: st.text(st.characters(codec="utf-8")), type(None): st.none()}[hint]


def settings_of(cls: type[Technique]) -> st.SearchStrategy[Technique]:
    """A technique with any valid settings; combinations that it refuses itself are left out."""
    hints = get_type_hints(cls)
    fields = {item.name: values(hints[item.name], item.metadata) for item in dataclasses.fields(cls)}
    return st.fixed_dictionaries({}, optional=fields).map(lambda given: _built(cls, given)).filter(bool)


def _built(cls: type[Technique], given: dict[str, Any]) -> Any:
    from hasten.core.errors import InvalidSetting

    try:
        return cls.build(given)
    except InvalidSetting:
        return None


def recipes() -> st.SearchStrategy[Recipe]:
    """Recipes of up to four techniques, whether or not they go together."""
    drawn = st.one_of(*(settings_of(cls) for cls in techniques().values()))
    return st.lists(drawn, max_size=4).map(lambda items: Recipe(tuple(items)))
