"""Predicts memory and time of recipes before anything is loaded, and picks the fastest that fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hasten.core.recipe import Recipe
from hasten.core.resolve import resolve
from hasten.core.technique import Cost, Technique
from hasten.core.workload import Workload
from hasten.search.prediction.calls import calls
from hasten.search.prediction.devices import Device
from hasten.search.prediction.ladder import Ladder, Rung, ladder
from hasten.search.prediction.model import PlannedModel
from hasten.search.prediction.networks import weight_bytes
from hasten.search.prediction.roofline import duration
from hasten.search.prediction.trace import Trace, trace

ALIKE = 1.05
"""Factor between two times within which a simpler recipe is preferred."""


@dataclass(frozen=True)
class Part:
    """One part of a pipeline and one call of it."""

    name: str
    weights: int
    """Bytes."""
    surplus: int = 0
    """Additional bytes of weights while it runs (a VAE that is cast to float32 for decoding)."""
    traced: Trace | None = None
    """None for a part that no picture needs."""
    times: int = 1
    """Calls for a picture; of the denoiser, for a step."""

    @property
    def activations(self) -> int:
        """Most bytes alive during a call beside weights and arguments."""
        return self.traced.peak_bytes if self.traced else 0


@dataclass(frozen=True)
class Profile:
    """What a model does for a workload: its parts and their traces. Independent of device and recipe."""

    model: PlannedModel
    workload: Workload
    parts: Mapping[str, Part]
    _costs: dict[Technique, Cost] = field(default_factory=dict[Technique, Cost], repr=False, compare=False)

    @property
    def denoiser(self) -> str:
        """Name of the part that is called at every step."""
        return self.model.target.denoisers[0].name

    def cost(self, technique: Technique) -> Cost:
        """What a technique predicts for itself; asked once."""
        if technique not in self._costs:
            self._costs[technique] = technique.cost(self.model.target, self.workload)
        return self._costs[technique]

    @cached_property
    def resting(self) -> int:
        """Bytes of what one phase hands to the next: embeddings and latents."""
        return sum(part.traced.output_bytes for part in self.parts.values() if part.traced)


def profile(model: PlannedModel, workload: Workload | None = None) -> Profile:
    """Trace one call of every part for a workload (default: as the model is usually run)."""
    asked = workload or model.workload
    repeated = model.target.denoisers[0].spec.repeated_blocks
    parts = {name: Part(name, size) for name, size in model.weights.items()}
    for call in calls(model, asked):
        surplus = max(weight_bytes(call.module) - parts[call.part].weights, 0)
        traced = trace(call.run, call.module, repeated)
        parts[call.part] = Part(call.part, parts[call.part].weights, surplus, traced, call.times)
    return Profile(model, asked, parts)


@dataclass(frozen=True)
class Prediction:
    """What a recipe is expected to take for one picture; no figures where it cannot run, or time is unknown."""

    recipe: Recipe
    memory: int | None = None
    """Peak bytes that PyTorch allocates on the device."""
    step_seconds: float | None = None
    """Mean time of a denoising step."""
    seconds: float | None = None
    """Time of a picture: text encoders, denoising, VAE, and transfers of weights."""
    phases: Mapping[str, float] = field(default_factory=dict[str, float])
    """Seconds of each part for a picture, and of `transfers`."""
    peaks: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bytes allocated at most while each part runs."""
    refusals: tuple[str, ...] = ()
    gives_up: str = ""

    @property
    def lossy(self) -> bool:
        """May the picture change by more than rounding?"""
        return any(item.lossy for item in self.recipe)


def predict(found: Profile, device: Device, recipe: Recipe | None = None, gives_up: str = "") -> Prediction:
    """Predict peak memory and time of one picture with a recipe (default: the plain pipeline)."""
    applied = recipe or Recipe()
    if refusals := resolve(applied, found.model.target).refusals:
        return Prediction(applied, refusals=refusals, gives_up=gives_up)
    costs = [found.cost(item) for item in applied]
    peaks = _peaks(found, device, costs)
    memory = max(peaks.values())
    if not all(cost.known or cost.extra_bytes < 0 for cost in costs):
        return Prediction(applied, memory, peaks=peaks, gives_up=gives_up)
    phases = _phases(found, device, costs)
    step = phases[found.denoiser] / found.workload.steps
    return Prediction(applied, memory, step, sum(phases.values()), phases, peaks, gives_up=gives_up)


def _peaks(found: Profile, device: Device, costs: Sequence[Cost]) -> dict[str, int]:
    """Bytes on the device while each part runs."""
    away = {name for cost in costs for name in cost.in_turn}
    sealed = any(cost.compiled == "whole" or cost.replayed for cost in costs)
    held = {name: _least(name, part.weights, costs) for name, part in found.parts.items()}
    if sealed:  # one piece of code needs all of its weights at once
        staying = [cost for cost in costs if found.denoiser not in cost.moved]
        held[found.denoiser] = _least(found.denoiser, found.parts[found.denoiser].weights, staying)
    extra = sum(cost.extra_bytes for cost in costs) + device.workspace + found.resting
    peaks: dict[str, int] = {}
    for name, part in found.parts.items():
        if part.traced is None:
            continue
        factor = _product(cost.activations.get(name, 1.0) for cost in costs)
        weights = sum(size for other, size in held.items() if other == name or other not in away)
        peaks[name] = max(weights + part.surplus + int(part.activations * factor) + extra, 0)
    return peaks


def _least(name: str, weights: int, costs: Iterable[Cost]) -> int:
    """Bytes of a part's weights on the device: what techniques leave of them, in proportion where several do."""
    return int(weights * _product(cost.held.get(name, weights) / max(weights, 1) for cost in costs))


def _phases(found: Profile, device: Device, costs: Sequence[Cost]) -> dict[str, float]:
    phases: dict[str, float] = {}
    for name, part in found.parts.items():
        if part.traced is not None:
            steps = found.workload.steps if name == found.denoiser else 1
            phases[name] = steps * part.times * _call(found, part, part.traced, device, costs)
    moving = {name for cost in costs for name in cost.moved}
    brought = {name for cost in costs for name in cost.in_turn} - moving
    size = sum(_least(name, found.parts[name].weights, costs) for name in brought)
    size += sum(size for cost in costs for size in cost.brought.values())
    phases["transfers"] = size / device.host_link
    return phases


def _call(found: Profile, part: Part, traced: Trace, device: Device, costs: Sequence[Cost]) -> float:
    """Seconds of one call; weights that are moved meanwhile come in beside the computation."""
    denoising = part.name == found.denoiser
    kinds = {cost.compiled for cost in costs} if denoising else set[str]()
    compiled = "whole" if "whole" in kinds else "blocks" if "blocks" in kinds else ""
    took = duration(traced, device, compiled, replayed=denoising and any(cost.replayed for cost in costs))
    casts = sum(cost.traffic.get(part.name, 0) for cost in costs) / device.bandwidth
    computing = max(took.device + casts, took.host) if device.overlaps else took.seconds + casts
    moving = _moved(part, costs) / device.host_link
    # What a cache leaves out is not moved either.
    factors = (cost.time_factor for cost in costs if cost.time_factor is not None)
    return max(computing, moving) * (_product(factors) if denoising else 1.0)


def _moved(part: Part, costs: Sequence[Cost]) -> int:
    """Bytes brought to the device in a call: of what others leave of the weights, the share that passes through."""
    left = _least(part.name, part.weights, [cost for cost in costs if part.name not in cost.moved])
    return sum(cost.moved.get(part.name, 0) for cost in costs) * left // max(part.weights, 1)


def _product(factors: Iterable[float]) -> float:
    total = 1.0
    for factor in factors:
        total *= factor
    return total


@dataclass(frozen=True)
class MemoryPlan:
    """The predictions of a ladder for one device and one limit of memory."""

    profile: Profile
    device: Device
    limit: int
    """Bytes that may be used, the driver's share included."""
    predictions: tuple[Prediction, ...]

    def fits(self, prediction: Prediction) -> bool:
        """Does it fit, with what driver and libraries take beside?"""
        return prediction.memory is not None and prediction.memory + self.device.reserve <= self.limit

    @property
    def pick(self) -> Prediction | None:
        """The fastest that fits and leaves the picture as it is; only where there is none, one that may change it."""
        return self._fastest(lossy=False) or self.faster

    @property
    def faster(self) -> Prediction | None:
        """The fastest that fits, whatever it does to the picture."""
        return self._fastest(lossy=True)

    def _fastest(self, *, lossy: bool) -> Prediction | None:
        fitting = [p for p in self.predictions if p.seconds is not None and self.fits(p) and (lossy or not p.lossy)]
        return min(fitting, key=_rank, default=None)

    @property
    def front(self) -> list[Prediction]:
        """The plain pipeline, and the fastest for each amount of memory, without and with changes to the picture."""
        kept = [p for p in self.predictions if not p.recipe.techniques]
        known = [p for p in self.predictions if p.seconds is not None and p.memory is not None]
        for one in sorted(known, key=lambda p: (*_rank(p), p.memory)):
            better = [k for k in kept if _rank(k) <= _rank(one) and k.lossy <= one.lossy]
            if not any((k.memory or 0) <= (one.memory or 0) for k in better):
                kept.append(one)
        return kept


def _rank(prediction: Prediction) -> tuple[int, bool, int]:
    """Sorts by time. Times that differ by less than predictions can tell apart count as equal: the simpler comes first.

    Of equal ones the ladder's order decides, which sorting keeps.
    """
    seconds = max(prediction.seconds or 0.0, 1e-9)
    return round(math.log(seconds) / math.log(ALIKE)), prediction.lossy, len(prediction.recipe)


def plan(found: Profile, device: Device, limit: int | None = None, rungs: Ladder | None = None) -> MemoryPlan:
    """Predict every rung of a ladder. `limit` is in bytes; the default is what the device has."""
    steps: list[Rung] = [rung for rung in (rungs or ladder()).rungs() if rung.suits(device)]
    predictions = tuple(predict(found, device, rung.recipe, rung.gives_up) for rung in steps)
    return MemoryPlan(found, device, device.memory if limit is None else limit, predictions)
