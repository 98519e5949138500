"""Runs one recipe over a workload: pictures, times, memory, and the proof that the recipe took part."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image

from hasten.core.errors import NotEngaged
from hasten.core.memory_limit import within_memory
from hasten.core.patch import summarize
from hasten.core.recipe import Recipe
from hasten.core.session import Session, accelerate
from hasten.core.target import Target
from hasten.core.technique import Evidence, Technique
from hasten.core.workload import Workload
from hasten.measure.instruments import PeakMemory, Stopwatch, synchronize
from hasten.measure.rendering import render

Picture = tuple[str, int]
"""Prompt and seed of one picture."""


@dataclass
class Run:
    """What one recipe did; filled while it runs, so that an interruption leaves what was finished."""

    recipe: Recipe
    workload: Workload
    images: list[Image.Image] = field(default_factory=list[Image.Image])
    seconds: list[float] = field(default_factory=list[float])
    first_image_seconds: float = 0.0
    apply_seconds: float = 0.0
    phases: dict[str, float] | None = None
    """Seconds per picture in each part of the pipeline; None for a run that was not finished."""
    peak_memory: int = 0
    evidence: list[Evidence] = field(default_factory=list[Evidence])
    changes: list[str] = field(default_factory=list[str])
    problem: str | None = None
    """Why the recipe did not take effect, if so."""

    @property
    def pictures(self) -> list[Picture]:
        """Prompt and seed of each picture, in order."""
        return [(prompt, seed) for prompt in self.workload.prompts for seed in self.workload.seeds]

    def restart(self, recipe: Recipe) -> None:
        """Begin anew with another recipe, as when the first one ran out of memory."""
        self.__dict__.update(Run(recipe, self.workload).__dict__)


def run_recipe(pipeline: Any, run: Run, *, runs: int = 1, advance: Callable[[], None] = lambda: None) -> None:
    """Apply `run.recipe`, make one warm-up picture, then every picture `runs` times, and fill `run` on the way.

    Set-up (applying, and what the first picture takes longer than the others) is kept apart. `advance` is
    called after each picture. An exception leaves in `run` what was finished, and the pipeline as it was.
    Raises OutOfMemory where the device has too little memory.
    """
    within_memory(lambda: _run(pipeline, run, runs, advance), str(run.recipe))


def _run(pipeline: Any, run: Run, runs: int, advance: Callable[[], None]) -> None:
    target, warm_up = Target.of(pipeline), dict[Technique, tuple[int, int]]()
    began = time.perf_counter()
    with accelerate(pipeline, run.recipe) as session:
        run.apply_seconds = time.perf_counter() - began
        memory = PeakMemory(target.device)
        try:
            with memory.watching():
                run.first_image_seconds = _timed(target, lambda: render(pipeline, run.workload, *run.pictures[0]))
                advance()
                warm_up |= _counts(session)
                _make_pictures(pipeline, run, target, runs, advance)
        finally:
            run.peak_memory = memory.bytes
            if run.images:
                _take_evidence(run, session, warm_up)


def _make_pictures(pipeline: Any, run: Run, target: Target, runs: int, advance: Callable[[], None]) -> None:
    watch = Stopwatch(target)
    with watch.running():
        for repetition in range(runs):
            for prompt, seed in run.pictures:
                with _stopping(target, run.seconds):
                    image = render(pipeline, run.workload, prompt, seed)
                if repetition == 0:
                    run.images.append(image)
                advance()
    run.phases = {name: total / max(len(run.seconds), 1) for name, total in watch.seconds().items()}


def _take_evidence(run: Run, session: Session, warm_up: dict[Technique, tuple[int, int]]) -> None:
    for technique in session.recipe:
        run.changes += summarize(session.log(technique))
        try:
            run.evidence.append(_without(technique.engaged(session), *warm_up.get(technique, (0, 0))))
        except NotEngaged as error:
            run.problem = f"{type(technique).__name__} did not engage: {error}"


def _counts(session: Session) -> dict[Technique, tuple[int, int]]:
    """Full and reused steps so far: those of the warm-up picture, which would count for its prompt twice."""
    found: dict[Technique, tuple[int, int]] = {}
    for technique in session.recipe:
        with suppress(NotEngaged):
            evidence = technique.engaged(session)
            found[technique] = (evidence.full_steps or 0, evidence.reused_steps or 0)
    return found


def _without(evidence: Evidence, full: int, reused: int) -> Evidence:
    if evidence.full_steps is None or evidence.reused_steps is None:
        return evidence
    return replace(evidence, full_steps=evidence.full_steps - full, reused_steps=evidence.reused_steps - reused)


def _timed(target: Target, work: Callable[[], object]) -> float:
    seconds: list[float] = []
    with _stopping(target, seconds):
        work()
    return seconds[0]


@contextmanager
def _stopping(target: Target, seconds: list[float]) -> Generator[None]:
    synchronize(target.device)
    began = time.perf_counter()
    yield
    synchronize(target.device)
    seconds.append(time.perf_counter() - began)
