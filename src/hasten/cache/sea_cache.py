"""SeaCache: look at the noisy picture through the noise, and compute when what it shows has changed enough."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hasten.cache.engine.accumulated import AccumulatedChange
from hasten.cache.engine.guess import Hold
from hasten.cache.engine.linear import Linear
from hasten.cache.engine.policy import Guarded, Policy
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.site import Site
from hasten.cache.engine.spectrum import POWER, filtered
from hasten.cache.engine.whole import no_whole, whole_site
from hasten.core.clock import Moment
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about


@dataclass(frozen=True, kw_only=True)
class SeaCache(Cache):
    """Filters the noise out of the denoiser's input, adds up its change, and reuses until the threshold is reached.

    The filter passes at each step the frequencies in which the picture is stronger than the noise. What all blocks
    add (of a U-Net the deep feature) is extrapolated along a line over the two latest computed steps. The decision
    needs no block and no calibration, but the noise level of each step; a scheduler that does not tell it makes
    every step compute.
    """

    syncs: ClassVar[bool] = True
    paper: ClassVar[str] = "SeaCache: Spectral-Evolution-Aware Cache (CVPR 2026), arXiv:2602.18993"

    threshold: float = field(
        default=0.25,
        metadata=about(
            "relative change of the filtered picture, summed up, that computes",
            ge=0.0,
            off=0.0,
            trial=1e6,
            budget="threshold",
        ),
    )
    order: int = field(default=1, metadata=about("1 extrapolates what is reused along a line, 0 holds it", ge=0, le=1))
    max_consecutive: int = field(default=2, metadata=about("longest run of reused steps; 0 is no limit", ge=0))
    first: int = field(default=1, metadata=about("first steps that are computed", ge=0))
    last: int = field(default=1, metadata=about("last steps that are computed", ge=0))
    power: float = field(
        default=POWER, metadata=about("how steeply a picture's power falls with the frequency", gt=0.0)
    )

    def problems(self, target: Target) -> Iterable[str]:
        """Needs blocks that can be left out."""
        return no_whole(target)

    def site(self, denoiser: Denoiser) -> Site:
        """All blocks; of a U-Net, everything but its last layer."""
        return whole_site(denoiser)

    def guess(self) -> Hold:
        """Along a line, or held."""
        return Linear() if self.order else Hold()

    def policy(self, denoiser: Denoiser) -> Policy:
        """The filtered picture's change, within the limits."""
        inner = AccumulatedChange(
            self.threshold, looks_at="input", see=self._see, unseen="the scheduler's noise levels are unknown"
        )
        first, last = self.first, self.last
        return Guarded(
            inner,
            warm_up=first,
            most_reused=self.max_consecutive or None,
            mask=lambda step, steps: steps is not None and step >= steps - last,
        )

    def _see(self, moment: Moment, picture: torch.Tensor) -> torch.Tensor | None:
        return None if moment.level is None else filtered(picture, moment.level, self.power)
