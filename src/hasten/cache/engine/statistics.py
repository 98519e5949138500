"""What a cache did, counted: computed and reused denoiser calls, why calls were computed, memory held."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from hasten.core.clock import Moment
from hasten.core.errors import NotEngaged
from hasten.core.technique import Evidence


@dataclass
class Statistics:
    """Counts denoiser calls of a session, and keeps the map of the last request."""

    counted: str = "denoiser calls"
    """What is counted, in words."""
    full: int = 0
    reused: int = 0
    reasons: Counter[str] = field(default_factory=Counter[str])
    """Why calls were computed that the policy alone might have left out."""
    notes: Counter[str] = field(default_factory=Counter[str])
    """What else was done, and how often."""
    most_bytes: int = 0
    """The most memory that kept values took, in bytes."""
    _request: int = -1
    _map: dict[str, list[bool]] = field(default_factory=dict[str, list[bool]])
    _latest: tuple[int, int, bool] = (-1, -1, False)

    def record(self, denoiser: str, moment: Moment, *, full: bool, reason: str = "") -> None:
        """Note the outcome of one denoiser call."""
        if moment.request != self._request:
            self._map, self._request = {}, moment.request
        self._map.setdefault(f"{denoiser} {moment.branch}", []).append(full)
        same = self._latest[:2] == (moment.request, moment.step)
        self._latest = (moment.request, moment.step, full and (self._latest[2] or not same))
        self.full += full
        self.reused += not full
        if full and reason:
            self.reasons[reason] += 1

    def complete(self, moment: Moment) -> bool:
        """Were all denoiser calls of this step, the latest one, computed in full?"""
        return self._latest == (moment.request, moment.step, True)

    def evidence(self, name: str, *, may_never_reuse: bool = False) -> Evidence:
        """Turn the counts into evidence; raises NotEngaged when no call was seen, or nothing was ever reused."""
        calls = self.full + self.reused
        if not calls:
            raise NotEngaged(f"{name} saw no denoiser call; run the pipeline inside the session first.")
        if not self.reused and not may_never_reuse:
            raise NotEngaged(f"{name} never reused anything in {calls} calls; {self._advice()}")
        return Evidence(
            summary=self._summary(),
            full_steps=self.full,
            reused_steps=self.reused,
            step_map={branch: tuple(steps) for branch, steps in self._map.items()},
        )

    def _summary(self) -> str:
        parts = [f"{self.reused} of {self.full + self.reused} {self.counted} reused earlier results"]
        if self.reasons:
            parts.append("computed because " + ", ".join(f"{why}: {count}" for why, count in self.reasons.items()))
        parts += [f"{what}: {count}" for what, count in self.notes.items()]
        if self.most_bytes:
            parts.append(f"held {self.most_bytes / 2**20:.3g} MiB")
        return "; ".join(parts)

    def _advice(self) -> str:
        if not self.reasons:
            return "raise its threshold or interval."
        why, count = self.reasons.most_common(1)[0]
        return f"{count} were computed because {why}."
