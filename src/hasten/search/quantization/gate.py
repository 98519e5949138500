"""The gate: a quantized pipeline has to make nearly the pictures of the original, or its worst layers get more bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from PIL import Image
from torch import nn

from hasten.core.errors import BrokenOutput, HastenError
from hasten.core.recipe import Recipe
from hasten.core.session import accelerate
from hasten.core.workload import Workload
from hasten.kernels.modules import Quantized
from hasten.measure.progress import Progress, Silent
from hasten.measure.quality import Fidelity, mean_fidelity
from hasten.measure.rendering import render
from hasten.quantize.engine.linear_quantizer import LinearQuantizer, Replaced
from hasten.quantize.engine.sites import Site
from hasten.search.quantization.calls import Call, record_calls
from hasten.search.quantization.sensitivity import errors_alone

ROUNDS = 4
"""How often layers are made finer before giving up."""
MARGIN = 1.0
"""Decibels that a back-off aims above the limit, as errors in single steps foretell those of pictures only roughly."""


@dataclass(frozen=True)
class Limits:
    """What the pictures have to reach, in the mean over prompts and seeds."""

    psnr: float | None = 25.0
    """dB at least."""
    ssim: float | None = None
    """At least."""
    lpips: float | None = None
    """At most."""

    def missed(self, found: Fidelity) -> tuple[str, ...]:
        """Each limit that is not met, in words."""
        checks = (
            (self.psnr is not None and not found.psnr >= self.psnr, f"PSNR {found.psnr:.2f} dB, below {self.psnr} dB"),
            (self.ssim is not None and not found.ssim >= self.ssim, f"SSIM {found.ssim:.4f}, below {self.ssim}"),
            (self.lpips is not None and not found.lpips <= self.lpips, f"LPIPS {found.lpips:.4f}, above {self.lpips}"),
        )
        return tuple(words for failed, words in checks if failed)

    def gap(self, found: Fidelity | None) -> float:
        """Decibels by which the error has to fall; for other measures than PSNR a guess of 3."""
        if found is None or not math.isfinite(found.psnr):
            return 3.0
        missing = (self.psnr or 0.0) - found.psnr
        return max(missing, 3.0 if missing <= 0 else 0.0) + MARGIN


@dataclass(frozen=True)
class Round:
    """One try: a recipe, what it reached, and what stood against it."""

    recipe: Recipe
    fidelity: Fidelity | None
    """None where a picture held undefined numbers."""
    missed: tuple[str, ...]
    bits: float
    """Of all that stands in place of the quantized weights, a weight."""
    layers: int
    finer: tuple[str, ...] = ()
    """Layers that got 8 bits for the next try."""
    left: tuple[str, ...] = ()
    """Layers that were left as they are for the next try."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report."""
        fidelity = self.fidelity.to_dict() if self.fidelity else None
        return {**asdict(self), "recipe": repr(self.recipe), "fidelity": fidelity}


@dataclass
class Verdict:
    """All tries; the last one counts."""

    limits: Limits
    rounds: list[Round] = field(default_factory=list[Round])

    @property
    def passed(self) -> bool:
        """Did the last try meet all limits?"""
        return bool(self.rounds) and not self.rounds[-1].missed

    @property
    def recipe(self) -> Recipe:
        """The recipe of the last try."""
        return self.rounds[-1].recipe

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a report."""
        rounds = [one.to_dict() for one in self.rounds]
        return {"passed": self.passed, "limits": asdict(self.limits), "rounds": rounds}


@dataclass
class Gate:
    """Checks recipes on the same prompts and seeds, and makes them finer where they fail."""

    pipeline: Any
    workload: Workload
    limits: Limits
    progress: Progress = field(default_factory=Silent)
    _plain: list[Image.Image] = field(default_factory=list[Image.Image])
    _calls: list[Call] = field(default_factory=list[Call])

    def run(self, recipe: Recipe, *, rounds: int = ROUNDS) -> Verdict:
        """Try a recipe; while it fails, give its worst layers more bits, at most `rounds` times.

        The pipeline is as before afterwards. Raises HastenError for a recipe that quantizes no layers.
        """
        quantizer = quantizer_of(recipe)
        self.progress.start(rounds + 2, self.workload.images)
        self._references()
        verdict = Verdict(self.limits)
        for number in range(rounds + 1):
            self.progress.row("checking" if not number else f"checking again ({number})")
            verdict.rounds.append(self._tried(recipe, quantizer, last=number == rounds))
            latest = verdict.rounds[-1]
            if not (latest.finer or latest.left):
                return verdict
            better = replace(
                quantizer, finer=(*quantizer.finer, *latest.finer), skip=(*quantizer.skip, *latest.left)
            )  # fmt: skip
            recipe = Recipe(tuple(better if item is quantizer else item for item in recipe))
            quantizer = better
        return verdict

    def _references(self) -> None:
        self.progress.row("original")
        if not self._plain:
            self._plain = self._pictures()
            self._calls = record_calls(self.pipeline, self.workload)

    def _pictures(self) -> list[Image.Image]:
        images: list[Image.Image] = []
        for prompt in self.workload.prompts:
            for seed in self.workload.seeds:
                images.append(render(self.pipeline, self.workload, prompt, seed))
                self.progress.advance()
        return images

    def _tried(self, recipe: Recipe, quantizer: LinearQuantizer, *, last: bool) -> Round:
        with accelerate(self.pipeline, recipe) as session:
            fidelity = self._fidelity()
            missed = ("a picture holds undefined numbers",) if fidelity is None else self.limits.missed(fidelity)
            places = session.state(quantizer, Replaced).places
            done = Round(recipe, fidelity, missed, bits_of(places), len(places))
            if not missed or last:
                return done
            finer, left = self._worst(places, self.limits.gap(fidelity))
            return replace(done, finer=tuple(finer), left=tuple(left))

    def _fidelity(self) -> Fidelity | None:
        try:
            return mean_fidelity(self._pictures(), self._plain)
        except BrokenOutput:
            return None

    def _worst(self, places: Sequence[tuple[Site, nn.Module]], gap: float) -> tuple[list[str], list[str]]:
        """Paths of layers without whose errors the sum would fall by `gap` decibels: to be finer, and to be left."""
        errors = errors_alone(places, self._calls)
        finer, left = list[str](), list[str]()
        for (site, module), (name, error) in zip(places, errors.items(), strict=True):
            if name in worst(errors, gap):
                (finer if _coarse(module) and math.isfinite(error) else left).append(site.path)
        return finer, left


def worst(errors: Mapping[str, float], gap: float) -> set[str]:
    """The fewest layers without whose errors the sum of all falls by `gap` decibels; at least one."""
    ordered = sorted(errors, key=lambda name: -errors[name])
    finite = sum(error for error in errors.values() if math.isfinite(error))
    allowed, chosen = finite * 10 ** (-gap / 10), set[str]()
    for name in ordered:
        if chosen and finite <= allowed:
            break
        chosen.add(name)
        finite -= errors[name] if math.isfinite(errors[name]) else 0.0
    return chosen


def _coarse(module: nn.Module) -> bool:
    return isinstance(module, Quantized) and (module.quantized.number.bits < 8 or module.activations != "none")


def bits_of(places: Sequence[tuple[Site, nn.Module]]) -> float:
    """Bits a weight that quantized layers take, scales, factors and side branches included."""
    held = sum(buffer.nbytes for _, module in places for buffer in module.buffers())
    count = sum(math.prod(site.layer.weight.shape) for site, _ in places) or 1
    return 8 * held / count


def quantizer_of(recipe: Recipe) -> LinearQuantizer:
    """The technique of a recipe that quantizes layers; raises HastenError where there is none."""
    for item in recipe:
        if isinstance(item, LinearQuantizer):
            return item
    raise HastenError(f"{recipe} quantizes no layers; give a technique such as SVDQuant() or Int8Linear().")
