"""Finds techniques and architectures: the export lines of our own packages, and entry points of others'."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from importlib.metadata import entry_points
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, TypeVar

from hasten.core.errors import HastenError, UnknownName
from hasten.core.technique import Technique

if TYPE_CHECKING:
    from hasten.core.spec import DenoiserSpec

V = TypeVar("V")
FAMILIES = ("attention", "compilation", "memory", "cache", "quantize", "parallel", "sampling")
TECHNIQUE_GROUP, DENOISER_GROUP = "hasten.techniques", "hasten.denoisers"


@functools.cache
def techniques() -> Mapping[str, type[Technique]]:
    """All techniques by name: what each family's `__all__` exports, then third parties' entry points."""
    found: dict[str, type[Technique]] = {}
    for module in (*_own_families(), *_foreign(TECHNIQUE_GROUP)):
        for value in _exports(module):
            if isinstance(value, type) and issubclass(value, Technique):
                _add(found, value.__name__, value, module)
    return MappingProxyType(dict(sorted(found.items())))


@functools.cache
def specs() -> Mapping[str, DenoiserSpec]:
    """All architectures by name, in order of export."""
    from hasten.core.spec import DenoiserSpec

    found: dict[str, DenoiserSpec] = {}
    for module in (importlib.import_module("hasten.denoisers"), *_foreign(DENOISER_GROUP)):
        for value in _exports(module):
            if isinstance(value, DenoiserSpec):
                _add(found, value.name, value, module)
    return MappingProxyType(found)


def technique(name: str) -> type[Technique]:
    """Look a technique up by name; an unknown one suggests neighbours."""
    try:
        return techniques()[name]
    except KeyError:
        raise UnknownName("technique", name, techniques()) from None


def family(cls: type[Technique]) -> str:
    """The family a technique belongs to: the package it is exported from."""
    parts = cls.__module__.split(".")
    return parts[1] if parts[0] == "hasten" and len(parts) > 1 else parts[0]


def _own_families() -> list[ModuleType]:
    return [importlib.import_module(f"hasten.{name}") for name in FAMILIES]


def _foreign(group: str) -> list[ModuleType]:
    # A third party's module that fails to import is an error: a plug-in must not vanish silently.
    return [entry.load() for entry in entry_points(group=group)]


def _exports(module: ModuleType) -> list[object]:
    return [getattr(module, name) for name in getattr(module, "__all__", ())]


def _add(found: dict[str, V], name: str, value: V, module: ModuleType) -> None:
    if name in found and found[name] is not value:
        raise HastenError(f"{module.__name__} exports a second {name!r}; names must be unique.")
    found[name] = value
