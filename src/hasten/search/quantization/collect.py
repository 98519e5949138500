"""Gathers statistics of the inputs of linear layers from a few pictures, over steps of the whole course."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from hasten.core.errors import HastenError
from hasten.core.patch import Patch
from hasten.core.recipe import Recipe
from hasten.core.session import Session, accelerate
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.weights import weights_hash
from hasten.core.workload import Workload
from hasten.measure.progress import Progress, Silent
from hasten.measure.rendering import render
from hasten.models import LoadedModel
from hasten.quantize.engine.calibrated import AUTO
from hasten.quantize.engine.sites import Site, sites
from hasten.quantize.engine.statistics_file import StatisticsFile, save_statistics, usual_file
from hasten.quantize.engine.watching import Watcher

FIRST_SEED = 1000
"""Seeds of calibration pictures begin here, apart from those that comparisons use."""
PICTURES, STEPS = 8, 8
COMPONENTS = ("transformer*", "unet", "prior", "denoiser", "text_encoder*")
"""What is watched: all that a quantizer may be told to take."""


@dataclass(frozen=True, kw_only=True)
class Collecting(Technique):
    """Watches what linear layers are given in some of the steps. It is no technique for users."""

    stage: ClassVar[Stage] = Stage.WEIGHTS
    steps: int = field(default=STEPS, metadata=about("steps of each picture that are watched", ge=1))

    def problems(self, target: Target) -> Iterable[str]:
        """Needs layers that a quantizer could take."""
        if not watched(target):
            yield f"{target.title} has no linear layers in blocks that could be quantized."

    def apply(self, target: Target, patch: Patch) -> None:
        """Put hooks on the layers; whether they look is decided when a denoiser is called."""
        watcher = patch.keep(Watcher(watched(target)))
        patch.undo(target.denoisers[0].module, "inputs of its layers are watched", watcher.stop)
        for denoiser in target.denoisers:
            patch.around(denoiser.module, _Chosen(watcher, patch, self.steps), "some of its steps are watched")

    def engaged(self, session: Session) -> Evidence:
        """Inputs were seen."""
        found = session.state(self, Watcher).statistics()
        return Evidence(summary=f"{len(found.layers)} layers were watched")

    def cost(self, target: Target, workload: Workload) -> Cost:
        """A product more for each input in the steps that are watched."""
        return Cost(basis="measured")


class _Chosen:
    """A link around a denoiser: its layers are looked at in steps that are spread evenly."""

    def __init__(self, watcher: Watcher, patch: Patch, steps: int) -> None:
        self._watcher, self._steps = watcher, steps
        self._now: Callable[[], Any] = lambda: patch.clock.now
        _ = patch.clock  # it has to be there before the first call

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        moment = self._now()
        self._watcher.active = moment.steps is None or moment.step in spread_steps(moment.steps, self._steps)
        try:
            return call(*args, **kwargs)
        finally:
            self._watcher.active = True


def spread_steps(steps: int, wanted: int) -> frozenset[int]:
    """So many of the steps, from the first to the last, as even as can be."""
    if wanted >= steps:
        return frozenset(range(steps))
    return frozenset(round((2 * number + 1) * steps / (2 * wanted) - 0.5) for number in range(wanted))


def watched(target: Target) -> list[Site]:
    """All layers that a quantizer may take."""
    return sites(target, COMPONENTS, (), convolutions=True, everywhere=True)


@contextmanager
def _collecting(pipeline: Any, steps: int, known: StatisticsFile | None) -> Generator[Watcher]:
    recipe = Collecting(steps=steps)
    with accelerate(pipeline, recipe) as session:
        watcher = session.state(recipe, Watcher)
        if known is not None:
            watcher.resume(known.statistics.layers, known.sums)
        yield watcher


def collect(
    model: LoadedModel,
    workload: Workload | None = None,
    *,
    file: Path | None = None,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> Path:
    """Watch a picture for each prompt of the workload, and write statistics to `file` (default: the user's cache).

    `steps` steps of each picture are watched. The file is written after each picture; called again with the same
    workload, what it holds is gone on from. Nothing but sums is kept: for K inputs K**2 numbers.
    """
    work = workload or model.workload.replace(prompts=model.workload.prompts[:PICTURES])
    weights = weights_hash(Target.of(model.pipeline).denoisers[0].module)
    place, shown = file or usual_file(weights), progress or Silent()
    about = _about(model, work, steps, weights)
    done, known = _begun(place, about)
    shown.start(1, len(work.prompts))
    shown.row(f"watching {model.name}")
    with _collecting(model.pipeline, steps, known) as watcher:
        for number, prompt in enumerate(work.prompts):
            if number >= done:
                watcher.half = number % 2
                render(model.pipeline, work, prompt, FIRST_SEED + number)
                finished = number + 1 == len(work.prompts)
                save_statistics(place, watcher, about | {"pictures": number + 1}, finished=finished)
            shown.advance()
    return place


def _about(model: LoadedModel, work: Workload, steps: int, weights: str) -> dict[str, Any]:
    facts = {"prompts": list(work.prompts), "steps": work.steps, "watched": steps, "guidance": work.guidance}
    return {"model": model.name, "weights_sha256": weights, **facts, "width": work.width, "height": work.height}


def _begun(file: Path, about: dict[str, Any]) -> tuple[int, StatisticsFile | None]:
    """How many pictures a file holds already, and its statistics; nothing of other weights or workloads."""
    try:
        opened = StatisticsFile(file)
    except HastenError:
        if file.exists() and file.stat().st_size and file != usual_file(about["weights_sha256"]):
            raise
        return 0, None
    if any(opened.about.get(name) != value for name, value in about.items()):
        return 0, None
    return int(opened.about.get("pictures", 0)), None if opened.finished else opened


def lacks_statistics(recipes: Iterable[Recipe], pipeline: Any) -> bool:
    """Does a technique look for statistics of this model that nobody has gathered yet?"""
    if not any(getattr(item, "statistics", None) == AUTO for recipe in recipes for item in recipe):
        return False
    return not usual_file(weights_hash(Target.of(pipeline).denoisers[0].module)).is_file()
