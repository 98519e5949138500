"""Whatever a tried thing does to its process, the rest is tried and it is named."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.core import packages
from hasten.core.diagnosis import Finding, findings, in_words
from hasten.core.errors import HastenError
from hasten.core.trying import in_another_process
from hasten.core.user_cache import user_cache


def tried(*names: str, seconds: float = 60.0) -> dict[str, Finding]:
    return {one.name: one for one in in_another_process("tests.core.unruly", "test", names, "here", seconds=seconds)}


def test_a_crash_is_a_finding_and_the_rest_is_tried() -> None:
    found = tried("one", "raises", "crashes", "two", "leaves", "exits", "three")
    assert list(found) == ["one", "raises", "crashes", "two", "leaves", "exits", "three"]
    assert {name for name, one in found.items() if one.status == "usable"} == {"one", "two", "three"}
    assert found["one"] == Finding(kind="test", name="one", status="usable", detail="on here")
    assert found["raises"].detail == "RuntimeError: no kernel image"
    assert found["crashes"].detail == "trying it ended the process with signal SIGSEGV"
    assert found["leaves"].detail == "trying it ended the process with exit code 3"
    assert found["exits"].detail == "SystemExit: enough"


def test_a_program_that_hangs_is_stopped() -> None:
    found = tried("hangs", seconds=3.0)
    assert found["hangs"].detail == "trying it took longer than 3 s"


def test_a_program_that_cannot_begin_says_why() -> None:
    found = list(in_another_process("hasten.no_such_module", "test", ["one"]))
    assert found[0].status == "broken"
    assert "No module named hasten.no_such_module" in found[0].detail


def test_a_family_that_fails_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    import hasten.attention

    def fail(device: torch.device) -> list[Finding]:
        raise ValueError("unexpected")

    monkeypatch.setattr(hasten.attention, "diagnose", fail)
    found = list(findings(("attention", "cache"), torch.device("cpu")))
    assert found == [Finding(kind="attention", name="attention", status="broken", detail="ValueError: unexpected")]


def test_errors_in_one_line() -> None:
    assert in_words(HastenError("a\n b")) == "a b"
    assert in_words(KeyError()) == "KeyError: no message"
    assert len(in_words(ValueError("x" * 1000))) < 330


def test_packages_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"peft": "0.16.0", "pandas": "", "rich": "14.1", "numpy": "2.1"}
    monkeypatch.setattr(packages, "installed", lambda name: versions[name])  # pyright: ignore

    def load(name: str) -> object:
        if name == "numpy":
            raise ImportError("undefined symbol")
        return object()

    monkeypatch.setattr(packages.importlib, "import_module", load)
    found = {name: packages.examine(name, torch.device("cpu")) for name in versions}
    assert [(one.status, one.kind) for one in found.values()] == [
        ("too old", "optional package"),
        ("missing", "optional package"),
        ("usable", "package"),
        ("broken", "package"),
    ]
    assert found["peft"].detail == "0.16.0; needed is 0.17: pip install -U 'peft>=0.17'"
    assert found["pandas"].detail == "results as a data frame: pip install 'pandas>=2.2'"
    assert found["numpy"].detail == "2.1 cannot be imported: ImportError: undefined symbol"


def test_the_list_of_packages_is_that_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    listed = {f"{entry.distribution}>={entry.least}" for entry in packages.PACKAGES.values() if not entry.optional}
    assert listed == set(project["dependencies"])
    optional = {f"{entry.distribution}>={entry.least}" for entry in packages.PACKAGES.values() if entry.optional}
    assert {*project["optional-dependencies"]["lora"], *project["optional-dependencies"]["pandas"]} <= optional


def test_a_compiler_that_miscompiles_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: function(x) + 0.1)  # pyright: ignore
    found = packages.examine("torch.compile", torch.device("cpu"))
    assert (found.status, found.detail) == ("broken", "its result is off by 0.1")


def test_where_measurements_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HASTEN_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert user_cache() == Path("/home/me/.cache/hasten")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert user_cache() == Path("/home/me/.cache/hasten")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert user_cache() == Path("/var/cache/me/hasten")
    monkeypatch.setenv("HASTEN_CACHE_DIR", "~/own")
    assert user_cache() == Path("/home/me/own")
