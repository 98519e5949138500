"""A cache folder of its own for each test, and no memory of kernels from one test in the next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten.attention import choosing
from hasten.attention.kernels import base, packages


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    _forget()
    yield
    _forget()


def _forget() -> None:
    choosing.forget()
    base.refusal.cache_clear()
    packages.load.cache_clear()
    packages.package_obstacle.cache_clear()
