"""DeepCache: on most steps compute only the outer part of a U-Net; its deep features change slowly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hasten.cache.engine.deep_feature import DeepFeatureSite, cuts
from hasten.cache.engine.policy import Fixed, every
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.problems import no_cut
from hasten.cache.engine.schedules import non_uniform
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about


@dataclass(frozen=True, kw_only=True)
class DeepCache(Cache):
    """Computes everything at every `interval`-th step of a request, and only the outer layers at the others.

    At those the deep feature of the last complete step stands in for the rest of the U-Net. `branch` counts the
    skip connections from the outside in, as in the paper's code: with 3 layers per up stage, branch 4 is layer 1
    of stage 1. The non-uniform schedule has as many complete steps, placed more densely around step `center`. Memory
    is one feature map per guidance branch. A T2I-Adapter makes every step compute.
    """

    paper: ClassVar[str] = "DeepCache: Accelerating Diffusion Models for Free (CVPR 2024), arXiv:2312.00858"

    interval: int = field(
        default=3, metadata=about("every how many steps all is computed", ge=1, off=1, budget="interval")
    )
    branch: int = field(
        default=0, metadata=about("skip connection to cut at; 0 computes least, the largest reuses least", ge=0)
    )

    schedule: Literal["uniform", "non_uniform"] = field(
        default="uniform", metadata=about("where the complete steps lie: at even distances, or denser around `center`")
    )
    center: int = field(default=15, metadata=about("the step around which a non-uniform schedule is densest", ge=0))
    power: float = field(
        default=1.4, metadata=about("how much denser; a non-uniform schedule needs more than 1", gt=1.0, le=10.0)
    )

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a U-Net of known stages that has the branch."""
        return (reason for denoiser in target.denoisers for reason in no_cut(denoiser, self.branch))

    def site(self, denoiser: Denoiser) -> DeepFeatureSite:
        """The U-Net, cut at the branch."""
        return DeepFeatureSite(denoiser, cuts(denoiser)[self.branch])

    def policy(self, denoiser: Denoiser) -> Fixed:
        """The schedule."""
        if self.schedule == "uniform" or self.interval == 1:
            return every(self.interval)
        return Fixed(non_uniform(self.interval, self.center, self.power))

    def in_words(self) -> str:
        """The interval."""
        return f"computes everything once in {self.interval} steps"
