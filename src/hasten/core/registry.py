"""Finds techniques and architectures: the export lines of our own packages, and entry points of others'."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
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
    return _collected((*_own_families(), *_foreign(TECHNIQUE_GROUP)))


@functools.cache
def own_techniques() -> Mapping[str, type[Technique]]:
    """The techniques of this package alone: what a plug-in may import from `hasten` while it is being loaded."""
    return _collected(_own_families())


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


def _collected(modules: Iterable[ModuleType]) -> Mapping[str, type[Technique]]:
    found: dict[str, type[Technique]] = {}
    for module in modules:
        for value in _exports(module):
            if isinstance(value, type) and issubclass(value, Technique):
                _add(found, value.__name__, value, module)
    return MappingProxyType(dict(sorted(found.items())))


def _own_families() -> list[ModuleType]:
    return [importlib.import_module(f"hasten.{name}") for name in FAMILIES]


def _foreign(group: str) -> list[ModuleType]:
    return [_load(entry) for entry in entry_points(group=group)]


def _load(entry: EntryPoint) -> ModuleType:
    # A third party's module that fails to import is an error: a plug-in must not vanish silently.
    try:
        return entry.load()
    except Exception as error:
        package = f" of the package {entry.dist.name}" if entry.dist else ""
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise HastenError(
            f"The plug-in {entry.name!r}{package} (entry point {entry.group} = {entry.value}) cannot be loaded: "
            f"{problem.rstrip('.')}."
        ) from error


def _exports(module: ModuleType) -> list[object]:
    return [getattr(module, name) for name in getattr(module, "__all__", ())]


def _add(found: dict[str, V], name: str, value: V, module: ModuleType) -> None:
    if name in found and found[name] is not value:
        raise HastenError(f"{module.__name__} exports a second {name!r}; names must be unique.")
    found[name] = value
