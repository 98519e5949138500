"""The registry: export lines and entry points, unique names, and errors that help."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import hasten
from hasten.cache import FirstBlockCache
from hasten.core import registry
from hasten.core.errors import HastenError, UnknownName
from hasten.core.expression import parse
from hasten.core.registry import FAMILIES, family, specs, technique, techniques
from hasten.core.spec import DenoiserSpec, unknown_spec
from hasten.core.technique import Technique


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Generator[dict[str, list[EntryPoint]]]:
    """Entry points that installed packages would declare."""
    declared: dict[str, list[EntryPoint]] = {}
    monkeypatch.setattr(registry, "entry_points", lambda group: declared.get(group, []))
    for cached in (techniques, specs):
        cached.cache_clear()
    yield declared
    for cached in (techniques, specs):
        cached.cache_clear()


def module(monkeypatch: pytest.MonkeyPatch, **contents: Any) -> ModuleType:
    """An importable module `plugin` that exports these names."""
    made = ModuleType("plugin")
    made.__dict__.update(contents, __all__=list(contents))
    monkeypatch.setitem(__import__("sys").modules, "plugin", made)
    return made


def test_every_family_is_searched_and_sorted() -> None:
    assert list(techniques()) == sorted(techniques())
    assert {"AttentionBackend", "CompileBlocks", "FirstBlockCache"} <= set(techniques())
    assert {family(cls) for cls in techniques().values()} <= set(FAMILIES)


def test_the_registry_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        techniques()["X"] = FirstBlockCache  # pyright: ignore


def test_unknown_techniques_suggest_neighbours() -> None:
    for name in ("firstblockcache", "FirstBlokCache"):
        with pytest.raises(UnknownName, match=r"Did you mean FirstBlockCache\?"):
            technique(name)
    with pytest.raises(UnknownName, match="Available: AWQ, AdaCache, AttentionBackend, "):
        technique("xyz")


def test_a_plugin_brings_a_technique(plugins: dict[str, list[EntryPoint]], monkeypatch: pytest.MonkeyPatch) -> None:
    class Foreign(FirstBlockCache):
        """Somebody else's."""

    module(monkeypatch, Foreign=Foreign, helper=3)
    plugins["hasten.techniques"] = [EntryPoint("any", "plugin", "hasten.techniques")]
    assert techniques()["Foreign"] is Foreign
    assert parse("Foreign(threshold=1)").techniques == (Foreign(threshold=1.0),)
    assert "helper" not in techniques()
    assert family(Foreign) == __name__.partition(".")[0]


def test_a_plugin_brings_an_architecture(plugins: dict[str, list[EntryPoint]], monkeypatch: pytest.MonkeyPatch) -> None:
    from torch import nn

    mine = unknown_spec(nn.Linear(1, 1))
    module(monkeypatch, MINE=mine)
    plugins["hasten.denoisers"] = [EntryPoint("any", "plugin", "hasten.denoisers")]
    assert specs()["unknown"] is mine


def test_a_second_technique_of_one_name_is_an_error(
    plugins: dict[str, list[EntryPoint]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module(monkeypatch, CompileBlocks=type("CompileBlocks", (Technique,), {}))
    plugins["hasten.techniques"] = [EntryPoint("any", "plugin", "hasten.techniques")]
    with pytest.raises(HastenError, match="plugin exports a second 'CompileBlocks'"):
        techniques()


def test_exporting_the_same_technique_again_is_fine(
    plugins: dict[str, list[EntryPoint]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module(monkeypatch, FirstBlockCache=FirstBlockCache)
    plugins["hasten.techniques"] = [EntryPoint("any", "plugin", "hasten.techniques")]
    assert techniques()["FirstBlockCache"] is FirstBlockCache


def test_a_broken_plugin_is_not_silent(plugins: dict[str, list[EntryPoint]]) -> None:
    plugins["hasten.techniques"] = [EntryPoint("any", "no_such_plugin", "hasten.techniques")]
    with pytest.raises(HastenError, match=r"The plug-in 'any' .*hasten\.techniques = no_such_plugin.*ModuleNotFound"):
        techniques()


@pytest.mark.parametrize("looked_for_first", [techniques, specs])
def test_a_plugin_may_import_our_techniques_while_it_is_loaded(
    looked_for_first: Callable[[], object],
    plugins: dict[str, list[EntryPoint]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    (tmp_path / "their_package.py").write_text(
        "from hasten import FirstBlockCache\nclass Theirs(FirstBlockCache):\n    'Theirs.'\n__all__ = ['Theirs']\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "their_package", raising=False)
    for group in ("hasten.techniques", "hasten.denoisers"):
        plugins[group] = [EntryPoint("theirs", "their_package", group)]
    looked_for_first()
    assert "Theirs" in techniques()
    assert hasten.Theirs is techniques()["Theirs"]


def test_architectures_are_specifications() -> None:
    assert all(isinstance(spec, DenoiserSpec) and spec.name == name for name, spec in specs().items())
