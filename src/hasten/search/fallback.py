"""What to do when memory runs out: the next rung of the ladder, named in the error or taken by itself."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from hasten.core.errors import HastenError
from hasten.core.memory_limit import OutOfMemory
from hasten.core.recipe import Recipe
from hasten.core.resolve import resolve
from hasten.core.target import Target
from hasten.core.technique import Stage
from hasten.core.workload import Workload
from hasten.formats.loading import load
from hasten.models import LoadedModel
from hasten.search.predict import Prediction, Profile, predict, profile
from hasten.search.prediction.devices import Device, find_device
from hasten.search.prediction.here import device_here
from hasten.search.prediction.ladder import Ladder, Rung, ladder
from hasten.search.prediction.model import PlannedModel, planned_from

R = TypeVar("R")
_SUBSTITUTE = "rtx4090"
"""Orders the rungs by time on devices that nothing is known of."""


@dataclass
class Adviser:
    """Knows which recipe to try after one that ran out of memory: the fastest that is predicted to need less.

    The recipe's own techniques stay as far as they go together with those that save memory. Nothing is tried twice.
    """

    model: Callable[[], PlannedModel]
    workload: Workload
    device: Device
    rungs: Ladder = field(default_factory=lambda: ladder())
    target: Target | None = None
    """The live pipeline, whose own refusals count as well."""
    parked: bool = False
    """Is the pipeline in host memory, because it did not fit? Then only recipes that bring weights to the GPU count."""
    _tried: list[frozenset[object]] = field(default_factory=list[frozenset[object]])
    _profile: Profile | None = None

    @classmethod
    def of(cls, pipeline: Any, workload: Workload, *, parked: bool = False) -> Adviser:
        """Advise on a live pipeline; it is looked at only when memory has run out."""
        target = Target.of(pipeline)
        device = _device(torch.device("cuda") if parked and torch.cuda.is_available() else target.device)
        return cls(lambda: planned_from(pipeline, workload=workload), workload, device, target=target, parked=parked)

    def after(self, recipe: Recipe) -> Prediction | None:
        """The next rung after `recipe` has run out of memory; None when none needs less."""
        self._tried.append(frozenset(recipe))
        known = self._profile = self._profile or profile(self.model(), self.workload)
        limit = predict(known, self.device, recipe).memory
        found = [predict(known, self.device, rung.recipe, rung.gives_up) for rung in self._candidates(recipe)]
        lower = [p for p in found if p.memory is not None and (limit is None or p.memory < limit)]
        return min(lower, key=lambda p: (sum(item.lossy for item in p.recipe), _time(p)), default=None)

    def enough(self, recipe: Recipe) -> Recipe:
        """The next rung's recipe, for a pipeline that does not fit as it is. Raises HastenError when there is none."""
        following = self.after(recipe)
        if following is None:
            raise HastenError(f"The model does not fit on the device. {advice(None)}")
        return following.recipe

    def _candidates(self, recipe: Recipe) -> list[Rung]:
        rungs = [one for saving in self.rungs.memory if saving.recipe.techniques for one in self._with(saving, recipe)]
        return [rung for rung in rungs if frozenset(rung.recipe) not in self._tried and self._suits(rung)]

    def _suits(self, rung: Rung) -> bool:
        return not self.parked or any(item.stage == Stage.RESIDENCY for item in rung.recipe)

    def _with(self, saving: Rung, recipe: Recipe) -> list[Rung]:
        """The recipe with a rung's techniques; where they do not go together, the rung's alone."""
        # What an earlier rung brought makes way for this one.
        kinds = {type(item) for rung in self.rungs.memory for item in rung.recipe}
        kept = Recipe(tuple(item for item in recipe if type(item) not in kinds))
        for one in (Rung(kept | saving.recipe, saving.gives_up), saving):
            if self.target is None or not resolve(one.recipe, self.target).refusals:
                return [one]
        return []


def _time(prediction: Prediction) -> float:
    return float("inf") if prediction.seconds is None else prediction.seconds


def _device(device: torch.device) -> Device:
    return device_here(device) or find_device(_SUBSTITUTE)


def advice(following: Prediction | None) -> str:
    """The sentence that an error ends with: the next rung, what it needs and what it gives up."""
    if following is None:
        return "No recipe is predicted to need less; make the picture smaller, or use a smaller model."
    size = f"{following.memory / 2**30:.1f} GiB predicted" if following.memory else "less memory"
    price = f"; {following.gives_up}" if following.gives_up else ""
    return f'Next to try: -r "{following.recipe}" ({size}{price}), or --fallback, which does so by itself.'


def load_or_park(
    name: str, *, device: str | None, dtype: str | None, fallback: bool, base: str | None = None
) -> tuple[LoadedModel, bool]:
    """Load a model; where it does not fit on the GPU and `fallback` is set, into host memory (then also True).

    Without it, OutOfMemory ends with what to try next. `base` is the pipeline that a file of weights goes into.
    """
    try:
        return load(name, base=base, device=device, dtype=dtype), False
    except OutOfMemory as error:
        if not fallback:
            raise error.advised(_before_loading(name)) from None
    gc.collect()
    torch.cuda.empty_cache()
    return load(name, base=base, device="cpu", dtype=dtype or "bfloat16"), True


def _before_loading(name: str) -> str:
    return f"Next to try: --fallback, which brings parts to the GPU in turn; `hasten plan {name}` says which and how."


def rescuer(adviser: Adviser, *, fallback: bool) -> Callable[[OutOfMemory, Recipe], Recipe]:
    """What a comparison does when memory runs out: the next rung with `fallback`, else the error with advice."""

    def rescue(error: OutOfMemory, recipe: Recipe) -> Recipe:
        following = adviser.after(recipe)
        if following is None or not fallback:
            raise error.advised(advice(following))
        return following.recipe

    return rescue


def rescued(
    work: Callable[[Recipe], R], recipe: Recipe, adviser: Adviser, *, fallback: bool = True
) -> tuple[R, list[Recipe]]:
    """Do `work` with a recipe, and as often as memory runs out with the next rung; return the rungs taken as well.

    `work` raises OutOfMemory (see `core.memory_limit`). Without `fallback`, or when no rung is left, that error is
    raised with advice.
    """
    taken: list[Recipe] = []
    rescue = rescuer(adviser, fallback=fallback)
    while True:
        try:
            return work(recipe), taken
        except OutOfMemory as error:
            recipe = rescue(error, recipe)
        taken.append(recipe)
