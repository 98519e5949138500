"""TaylorSeer: forecast what attention and feed-forward would put out, instead of reusing what they did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hasten.cache.engine.branches import BranchSite
from hasten.cache.engine.fronts import front_site, no_front
from hasten.cache.engine.guess import Hold
from hasten.cache.engine.output import OutputSite
from hasten.cache.engine.policy import Fixed, Policy
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.problems import no_branches, noisy_sampler
from hasten.cache.engine.site import Site
from hasten.cache.engine.taylor import hold_or_taylor
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about

Where = Literal["branches", "residual", "output"]


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Cache):
    """Computes the first `warm_up` steps and then every `interval`-th; forecasts the steps between.

    A forecast is a Taylor series in the step index: order 0 holds, order 1 goes on along a line. At
    `forecast="branches"`, as published, each attention and feed-forward output is forecast before its gate, and
    `order + 1` computed outputs of every branch stay in memory, per guidance branch: gigabytes on a large model,
    which `cost` states beforehand. "residual" forecasts what all blocks together add (of a U-Net the deep feature),
    "output" the whole output: much less memory. A sampler that adds noise at each step makes forecasts useless.
    """

    cuts_blocks: ClassVar[bool] = True
    paper: ClassVar[str] = "TaylorSeer: From Reusing to Forecasting (ICCV 2025), arXiv:2503.06923"

    interval: int = field(
        default=5,
        metadata=about(
            "every how many steps all is computed after the warm-up", ge=1, off=1, trial=2, budget="interval"
        ),
    )
    order: int = field(default=1, metadata=about("degree of the Taylor series; 0 reuses as it is", ge=0, le=3))
    warm_up: int = field(default=3, metadata=about("first steps that are computed", ge=1, trial=1))
    forecast: Where = field(default="branches", metadata=about("what is forecast: branches, residual or output"))

    def problems(self, target: Target) -> Iterable[str]:
        """Needs what the forecasts are of, and a sampler that adds no noise."""
        if self.forecast == "branches":
            yield from (reason for denoiser in target.denoisers for reason in _no_branches(denoiser))
        elif self.forecast == "residual":
            yield from no_front(target, front=0, back=0)
        if self.order:
            yield from noisy_sampler(target)

    def site(self, denoiser: Denoiser) -> Site:
        """A cell around every branch, or all blocks, or the whole denoiser."""
        if self.forecast == "branches":
            return BranchSite(denoiser)
        return front_site(denoiser, front=0, back=0) if self.forecast == "residual" else OutputSite()

    def policy(self, denoiser: Denoiser) -> Policy:
        """All of the warm-up, and every `interval`-th step from its last one."""
        last = self.warm_up - 1
        return Fixed(lambda step, steps: step <= last or (step - last) % self.interval == 0, own_start=True)

    def guess(self) -> Hold:
        """The series."""
        return hold_or_taylor(self.order, begin=0)

    def in_words(self) -> str:
        """The interval."""
        return f"computes everything once in {self.interval} steps after the first {self.warm_up}"


def _no_branches(denoiser: Denoiser) -> Iterator[str]:
    if denoiser.spec.unet is not None:
        yield 'a U-Net has no chain of equal blocks; forecast="residual" forecasts its deep feature.'
    else:
        yield from no_branches(denoiser)
