"""DeepCache: on most steps compute only the outer part of a U-Net; its deep features change slowly."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from hasten.cache.engine.deep_feature import DeepFeatureSite, cuts
from hasten.cache.engine.policy import Policy, every
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.problems import no_cut
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about


@dataclass(frozen=True, kw_only=True)
class DeepCache(Cache):
    """Computes everything at every `interval`-th step of a request, and only the outer layers at the others.

    At those the deep feature of the last complete step stands in for the rest of the U-Net. `branch` counts the
    skip connections from the outside in, as in the paper's code: with 3 layers per up stage, branch 4 is layer 1
    of stage 1. Memory is one feature map per guidance branch. A T2I-Adapter makes every step compute.
    """

    paper: ClassVar[str] = "DeepCache: Accelerating Diffusion Models for Free (CVPR 2024), arXiv:2312.00858"

    interval: int = field(default=3, metadata=about("every how many steps all is computed", ge=1, off=1))
    branch: int = field(
        default=0, metadata=about("skip connection to cut at; 0 computes least, the largest reuses least", ge=0)
    )

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a U-Net of known stages that has the branch."""
        return (reason for denoiser in target.denoisers for reason in no_cut(denoiser, self.branch))

    def site(self, denoiser: Denoiser) -> DeepFeatureSite:
        """The U-Net, cut at the branch."""
        return DeepFeatureSite(denoiser, cuts(denoiser)[self.branch])

    def policy(self, denoiser: Denoiser) -> Policy:
        """Every `interval`-th step."""
        return every(self.interval)

    def in_words(self) -> str:
        """The interval."""
        return f"computes everything once in {self.interval} steps"
