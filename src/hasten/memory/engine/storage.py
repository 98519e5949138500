"""Where weights are at home: ordinary host memory, page-locked host memory up to a budget, or a file."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from hasten.memory.engine.arena import Arena, size_in_arena
from hasten.memory.engine.weights import Unit, dense


class Storage:
    """Finds every unit a home and gives it back at the end.

    `budget` is the amount of page-locked memory in bytes, `folder` where files go (None: no files). The original data
    are let go as soon as a unit has its home, so that memory is needed once, and for one unit twice.
    """

    def __init__(self, budget: int, folder: Path | None, pin: Callable[[Arena], None] = Arena.pin) -> None:
        self._budget, self._pin = budget, pin
        self._files = None if folder is None else Path(tempfile.mkdtemp(prefix="hasten-weights-", dir=folder))
        self._arenas: list[Arena] = []
        self._units: list[Unit] = []
        self.pinned = 0
        """Page-locked bytes."""
        self.on_disk = 0
        """Bytes in files."""

    def store(self, units: Iterable[Unit]) -> None:
        """Bring the units home; those that come first get the page-locked memory."""
        for unit in units:
            self._units.append(unit)
            packable = all(dense(weight.home) for weight in unit.weights)
            if self._files is not None and packable:
                self._to_file(unit, self._files)
            elif packable and 0 < size_in_arena([weight.home for weight in unit.weights]) <= self._budget - self.pinned:
                self._to_pinned(unit)
            else:
                _to_host(unit)

    def close(self) -> None:
        """Give every weight data of its own again, and remove files."""
        while self._units:
            self._units[-1].restore()
            self._units.pop()
        while self._arenas:
            self._arenas.pop().close()
        if self._files is not None:
            shutil.rmtree(self._files, ignore_errors=True)

    def _to_pinned(self, unit: Unit) -> None:
        arena = Arena([weight.home for weight in unit.weights])
        self._pin(arena)
        self._arenas.append(arena)
        self.pinned += arena.buffer.numel()
        _settle(unit, arena)

    def _to_file(self, unit: Unit, folder: Path) -> None:
        from safetensors import safe_open
        from safetensors.torch import save_file

        if not unit.bytes:
            return
        path = folder / f"{len(self._units):05}.safetensors"
        arena = Arena([weight.home for weight in unit.weights])
        save_file({"weights": arena.buffer}, path, metadata={"unit": unit.name})
        with safe_open(path, framework="pt") as opened:
            arena.buffer = opened.get_tensor("weights")  # mapped into memory, read when it is copied
        self.on_disk += arena.buffer.numel()
        _settle(unit, arena)


def _settle(unit: Unit, arena: Arena) -> None:
    unit.arena = arena
    for weight, view in zip(unit.weights, arena.views(arena.buffer), strict=True):
        weight.settle(view)


def _to_host(unit: Unit) -> None:
    for weight in unit.weights:
        if weight.home.device.type != "cpu":
            weight.settle(weight.home.to("cpu"))


def half_of_memory() -> int:
    """Half of this machine's memory in bytes; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 0


def folder_problem(folder: str, needed: int) -> str | None:
    """Say why weights cannot be written to a folder."""
    if not Path(folder).is_dir():
        return f"the folder {folder!r} for weights on disk does not exist."
    free = shutil.disk_usage(folder).free
    if free < needed:
        return f"the folder {folder!r} has {free / 1e9:.1f} GB free, and the weights take {needed / 1e9:.1f} GB."
    return None
