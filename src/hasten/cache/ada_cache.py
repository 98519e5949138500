"""AdaCache: the less a middle block changes from one computed step to the next, the longer all blocks are reused."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hasten.cache.engine.branches import BranchSite, place_in_the_middle
from hasten.cache.engine.change import group_of
from hasten.cache.engine.codebook import Codebook, LookedUp, Rates, published
from hasten.cache.engine.policy import Policy
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.problems import no_branches
from hasten.core.errors import InvalidSetting
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about

Name = Literal["fast", "slow", "long"]


@dataclass(frozen=True, kw_only=True)
class AdaCache(Cache):
    """Reuses what attention and feed-forward put out, for as long as a codebook allows.

    At each computed step the attention output of the middle block is compared with that of the computed step
    before: relative L1 distance, the largest over the batch, divided by the steps between. The codebook turns it into
    the number of steps to the next computed one. Codebooks as published, measured on a model of videos: "fast" and
    "slow" for about 30 steps, "long" for about 100; or pairs of change and rate, rising. With `motion`, videos in
    which frames differ much are computed more often (the paper's MoReg). Outputs are kept before the gate, which
    follows the present timestep; the paper's code keeps them behind it.
    """

    cuts_blocks: ClassVar[bool] = True
    syncs: ClassVar[bool] = True
    paper: ClassVar[str] = "Adaptive Caching for Faster Video Generation with DiTs (ICCV 2025), arXiv:2411.02397"

    codebook: Name | Rates = field(
        default="fast",
        metadata=about("a published codebook, or pairs (change, rate); () always computes", off=(), trial=((1e9, 3),)),
    )
    stretch: float = field(
        default=1.0,
        metadata=about(
            "factor on the codebook's changes, for models that change more or less", gt=0.0, budget="threshold"
        ),
    )
    motion: bool = field(default=False, metadata=about("compute videos with much motion more often"))
    warm_up: int = field(default=2, metadata=about("first steps that are computed", ge=1, trial=1))
    cool_down: int = field(default=2, metadata=about("last steps that are computed", ge=0, trial=0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.codebook, tuple):
            _check(self.codebook)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs declared branches; motion needs frames."""
        for denoiser in target.denoisers:
            yield from no_branches(denoiser)
            if self.motion and not denoiser.spec.frames_per_token:
                yield f"{denoiser.spec.model_class} makes pictures, in which nothing moves; set motion=False."
            elif self.motion and group_of(denoiser.module) is not None:
                yield "motion cannot be measured where each rank sees a part of the video; set motion=False."

    def site(self, denoiser: Denoiser) -> BranchSite:
        """A cell around every branch."""
        return BranchSite(denoiser)

    def policy(self, denoiser: Denoiser) -> Policy:
        """As long as the codebook allows."""
        book = published(self.codebook) if isinstance(self.codebook, str) else Codebook(self.codebook)
        return LookedUp(
            book.stretched(self.stretch),
            place_in_the_middle(denoiser),
            warm_up=self.warm_up,
            cool_down=self.cool_down,
            group=group_of(denoiser.module),
            frames_per_token=denoiser.spec.frames_per_token if self.motion else 0,
        )

    def in_words(self) -> str:
        """Where the decision is made."""
        return "reuses the longer, the less the middle block's attention changes"


def _check(rates: Rates) -> None:
    if any(len(pair) != 2 or pair[1] < 1 or pair[1] % 1 for pair in rates):
        raise InvalidSetting(f"AdaCache(codebook={rates}): write pairs such as (0.08, 6): change, whole steps.")
    limits = [pair[0] for pair in rates]
    if any(not after > before for before, after in itertools.pairwise(limits)):
        raise InvalidSetting(f"AdaCache(codebook={rates}): the changes must rise, as in ((0.08, 6), (1.0, 1)).")
