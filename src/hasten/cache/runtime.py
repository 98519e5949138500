"""Shared run-time parts of caches: what is remembered per branch, and the record of computed and reused steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hasten.core.clock import Moment
from hasten.core.errors import NotEngaged
from hasten.core.technique import Evidence

S = TypeVar("S")


class BranchStore(Generic[S]):
    """One state per (denoiser, guidance branch), dropped as soon as a new request begins."""

    def __init__(self, create: Callable[[], S]) -> None:
        self._create = create
        self._request = -1
        self._states: dict[tuple[str, str], S] = {}

    def at(self, denoiser: str, moment: Moment) -> S:
        """The state of this branch in this request; a fresh one when there is none yet."""
        if moment.request != self._request:
            self._states.clear()
            self._request = moment.request
        return self._states.setdefault((denoiser, moment.branch), self._create())


@dataclass
class Decisions:
    """Counts computed and reused denoiser calls, and keeps the map of the last request."""

    full: int = 0
    reused: int = 0
    _request: int = -1
    _map: dict[str, list[bool]] = field(default_factory=dict[str, list[bool]])

    def record(self, denoiser: str, moment: Moment, *, full: bool) -> None:
        """Note the outcome of one denoiser call."""
        if moment.request != self._request:
            self._map, self._request = {}, moment.request
        self._map.setdefault(f"{denoiser} {moment.branch}", []).append(full)
        self.full += full
        self.reused += not full

    def evidence(self, name: str, *, may_never_reuse: bool = False) -> Evidence:
        """Turn the counts into evidence; raises NotEngaged when no call was seen, or nothing was ever reused."""
        calls = self.full + self.reused
        if not calls:
            raise NotEngaged(f"{name} saw no denoiser call; run the pipeline inside the session first.")
        if not self.reused and not may_never_reuse:
            raise NotEngaged(f"{name} never reused anything in {calls} calls; raise its threshold or interval.")
        return Evidence(
            summary=f"{self.reused} of {calls} denoiser calls reused earlier results",
            full_steps=self.full,
            reused_steps=self.reused,
            step_map={branch: tuple(steps) for branch, steps in self._map.items()},
        )
