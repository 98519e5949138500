"""StepMask: a fixed pattern of computed steps; at the others the middle of the denoiser is reused or forecast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from hasten.cache.engine.fronts import front_site, no_front
from hasten.cache.engine.guess import Hold
from hasten.cache.engine.masks import check_mask, computes
from hasten.cache.engine.policy import Fixed
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.site import Site
from hasten.cache.engine.taylor import hold_or_taylor
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about


@dataclass(frozen=True, kw_only=True)
class StepMask(Cache):
    """Computes the steps that a mask names; the others reuse what the blocks after the front added.

    Nothing is measured and nothing waits: the pattern is known before the request begins. The presets are published
    for 4, 6 and from 8 steps on; requests of other lengths are computed. A mask that is written out computes what
    lies beyond its end. On a U-Net the front is that many of the outermost down layers.
    """

    paper: ClassVar[str] = "cache-dit, step computation masks (2025), https://github.com/vipshop/cache-dit"

    mask: str = field(
        default="fast",
        metadata=about(
            "steps to compute: slow, medium, fast, ultra, or written out such as 1101", off="1", trial="1101"
        ),
    )
    front: int = field(default=1, metadata=about("blocks that are always computed first", ge=0))
    back: int = field(default=0, metadata=about("blocks that are always computed last", ge=0))
    order: int = field(default=0, metadata=about("order of the Taylor forecast; 0 holds what was added", ge=0, le=2))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_mask("StepMask: mask", self.mask)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a block between front and back."""
        return no_front(target, front=self.front, back=self.back)

    def site(self, denoiser: Denoiser) -> Site:
        """What the blocks between front and back add."""
        return front_site(denoiser, front=self.front, back=self.back)

    def policy(self, denoiser: Denoiser) -> Fixed:
        """The mask."""
        return Fixed(computes(self.mask))

    def guess(self) -> Hold:
        """Held, or forecast in step index."""
        return hold_or_taylor(self.order)

    def in_words(self) -> str:
        """The mask."""
        return f"computes the steps of the mask {self.mask}"
