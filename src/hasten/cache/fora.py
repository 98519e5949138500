"""FORA: on most steps reuse what attention and feed-forward put out, and compute only what depends on the step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

from hasten.cache.engine.branches import BranchSite
from hasten.cache.engine.policy import Policy, every
from hasten.cache.engine.preset import Cache
from hasten.cache.engine.problems import no_branches
from hasten.core.target import Denoiser, Target
from hasten.core.technique import about


@dataclass(frozen=True, kw_only=True)
class FORA(Cache):
    """Computes everything at every `interval`-th step of a request; the steps between reuse each block's branches.

    A branch is an attention or feed-forward module whose output is gated and added to a stream. What is reused is
    its output before the gate; shift, scale and gate follow the present timestep. The outputs of all branches
    stay in memory, per guidance branch.
    """

    cuts_blocks: ClassVar[bool] = True
    paper: ClassVar[str] = "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration (2024), arXiv:2407.01425"

    interval: int = field(
        default=2, metadata=about("every how many steps all is computed", ge=1, off=1, budget="interval")
    )

    def problems(self, target: Target) -> Iterable[str]:
        """Needs declared branches; a feed-forward that runs in chunks has no single output to keep."""
        return (reason for denoiser in target.denoisers for reason in no_branches(denoiser))

    def site(self, denoiser: Denoiser) -> BranchSite:
        """A cell around every branch."""
        return BranchSite(denoiser)

    def policy(self, denoiser: Denoiser) -> Policy:
        """Every `interval`-th step."""
        return every(self.interval)

    def in_words(self) -> str:
        """The interval."""
        return f"computes everything once in {self.interval} steps"
