"""DBCache: a front of blocks tells how much a step changes, a back corrects it; what lies between is reused."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hasten.cache.engine.change import OverBatch
from hasten.cache.engine.fronts import front_site, no_front
from hasten.cache.engine.guess import Hold
from hasten.cache.engine.masks import check_mask, computes
from hasten.cache.engine.policy import Fixed, Guarded, Policy
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.site import Site
from hasten.cache.engine.taylor import hold_or_taylor
from hasten.cache.engine.thresholds import ChangeOfFront
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about


@dataclass(frozen=True, kw_only=True)
class DBCache(Cache):
    """Reuses what the blocks between front and back add while the front's residual stays near the last full step's.

    A step is computed, in this order, during the warm-up (or where the mask says so), after `max_consecutive` reused
    steps, and when the relative L1 change mean|a - b| / mean|b| of the front's residual reaches the threshold. Only
    computed steps replace what is compared with. One decision holds for all guidance branches of a step. On a U-Net
    the front is that many of the outermost down layers, with the up layers joined to them.
    """

    syncs: ClassVar[bool] = True
    paper: ClassVar[str] = "cache-dit, DBCache (2025), https://github.com/vipshop/cache-dit"

    front: int = field(default=8, metadata=about("blocks that are always computed first (Fn)", ge=1, trial=1))
    back: int = field(default=0, metadata=about("blocks that are always computed last (Bn)", ge=0))
    threshold: float = field(
        default=0.08,
        metadata=about(
            "relative change of the front's residual below which is reused",
            ge=0.0,
            off=0.0,
            trial=10.0,
            budget="threshold",
        ),
    )
    warm_up: int = field(
        default=8, metadata=about("first steps that are always computed; a step mask takes its place", ge=0, trial=1)
    )
    max_consecutive: int | None = field(
        default=None, metadata=about("most steps in a row that may be reused; None for any number", ge=1)
    )
    step_mask: str | None = field(
        default=None,
        metadata=about("steps that are always computed: slow, medium, fast, ultra, or written out such as 1101"),
    )
    mask_policy: Literal["dynamic", "static"] = field(
        default="dynamic",
        metadata=about("whether the steps that the mask leaves free go by the threshold, or are always reused"),
    )
    late: bool = field(
        default=False,
        metadata=about("decide by the change of the step before, carried on at its rate, and never wait for the GPU"),
    )
    over_batch: OverBatch = field(
        default="max", metadata=about("whether the picture that changes most decides for its batch, or the mean")
    )
    forecast: int = field(
        default=0, metadata=about("order of the Taylor forecast of what is reused; 0 holds it", ge=0, le=3)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.step_mask is not None:
            check_mask("DBCache: step_mask", self.step_mask)

    def waits(self) -> bool:
        """Unless it decides late, or the mask decides alone."""
        return not self.late and not self._static

    @property
    def _static(self) -> bool:
        return self.step_mask is not None and self.mask_policy == "static" and self.threshold > 0

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a block between front and back, and to decide after the front."""
        return no_front(target, front=self.front, back=self.back)

    def site(self, denoiser: Denoiser) -> Site:
        """What the blocks between front and back add."""
        return front_site(denoiser, front=self.front, back=self.back)

    def policy(self, denoiser: Denoiser) -> Policy:
        """The change of the front within the limits, or the mask alone."""
        mask = None if self.step_mask is None else computes(self.step_mask)
        if mask is not None and self._static:
            return Fixed(mask)
        change = ChangeOfFront(denoiser, self.threshold, how=self.over_batch, late=self.late)
        warm_up = self.warm_up if mask is None else 0
        return Guarded(change, warm_up=warm_up, most_reused=self.max_consecutive, mask=mask)

    def guess(self) -> Hold:
        """Held, or forecast in step index."""
        return hold_or_taylor(self.forecast)
