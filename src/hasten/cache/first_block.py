"""First Block Cache: when the first block changes little from step to step, reuse what the others added."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from hasten.cache.engine.fronts import front_site, no_front
from hasten.cache.engine.policy import Policy
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.site import Site
from hasten.cache.engine.thresholds import ChangeOfFront
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(Cache):
    """Compares the first block's residual with the last computed step's; below the threshold the rest is reused.

    The measure is the relative L1 distance mean|a - b| / mean|b| in float32, the largest over the batch. One
    decision holds for all guidance branches of a step. On a U-Net the first layer takes the part of the first block,
    and the deep feature that of the residual. It is DBCache with one block in front and no further limits.
    """

    syncs: ClassVar[bool] = True
    paper: ClassVar[str] = "ParaAttention, First Block Cache (2024); a special case of DBCache (cache-dit, 2025)"

    threshold: float = field(
        default=0.08,
        metadata=about(
            "relative change of the first block's residual below which is reused",
            ge=0.0,
            off=0.0,
            trial=10.0,
            budget="threshold",
        ),
    )
    late: bool = field(
        default=False,
        metadata=about("decide by the change of the step before, carried on at its rate, and never wait for the GPU"),
    )

    def waits(self) -> bool:
        """Unless it decides late."""
        return not self.late

    def problems(self, target: Target) -> Iterable[str]:
        """Needs at least two blocks, and to decide between them, which a whole compiled model cannot."""
        return no_front(target, front=1, back=0)

    def site(self, denoiser: Denoiser) -> Site:
        """What all blocks but the first add."""
        return front_site(denoiser, front=1, back=0)

    def policy(self, denoiser: Denoiser) -> Policy:
        """The change of the first block's residual since the last computed step."""
        return ChangeOfFront(denoiser, self.threshold, late=self.late)
