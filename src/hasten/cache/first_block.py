"""First Block Cache: when the first block changes little from step to step, reuse what the others added."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hasten.cache.problems import no_stack
from hasten.cache.runtime import BranchStore, Decisions
from hasten.cache.stack import Decide, StackReuse, StackRun
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Denoiser, Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload


class _Run(StackRun):
    """One branch: the residual of the stacks, and the first block's own residual at the last computed step."""

    def __init__(self) -> None:
        super().__init__()
        self.anchor: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(Technique):
    """Compares the first block's residual with the last computed step's; below the threshold the rest is reused.

    The measure is the relative L1 distance mean|a - b| / mean|b| in float32, the largest over the batch. Each
    guidance branch has a state of its own. A change of batch, size, dtype or request computes.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    lossy: ClassVar[bool] = True
    syncs: ClassVar[bool] = True
    paper: ClassVar[str] = "ParaAttention, First Block Cache (2024); a special case of DBCache (cache-dit, 2025)"

    threshold: float = field(
        default=0.08,
        metadata=about(
            "relative change of the first block's residual below which is reused", ge=0.0, off=0.0, trial=10.0
        ),
    )

    def claims(self) -> tuple[str, ...]:
        """Decides which blocks are computed."""
        return ("stack.compute:*",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a chain of at least two blocks, and to decide between them, which a whole compiled model cannot."""
        yield from no_stack(target, at_least=2)
        for denoiser in target.denoisers:
            if denoiser.module._compiled_call_impl is not None:
                yield f"{denoiser.spec.model_class} is compiled as a whole; compile its blocks instead (CompileBlocks)."

    def apply(self, target: Target, patch: Patch) -> None:
        """Install the decision on every denoiser."""
        decisions = patch.keep(Decisions())
        for denoiser in target.denoisers:
            self._install(denoiser, patch, decisions)

    def _install(self, denoiser: Denoiser, patch: Patch, decisions: Decisions) -> None:
        store, clock = BranchStore(_Run), patch.clock

        def select() -> tuple[StackRun, Decide]:
            run, moment = store.at(denoiser.name, clock.now), clock.now

            def decide(before: torch.Tensor, after: torch.Tensor, possible: bool) -> bool:
                residual = after - before
                reused = possible and self._is_near(residual, run.anchor)
                if not reused:
                    run.anchor = residual
                decisions.record(denoiser.name, moment, full=not reused)
                return reused

            return run, decide

        StackReuse(denoiser, select).install(patch)

    def _is_near(self, residual: torch.Tensor, anchor: torch.Tensor | None) -> bool:
        if anchor is None or anchor.shape != residual.shape or self.threshold <= 0:
            return False
        return bool((relative_change(residual, anchor) < self.threshold).all())

    def engaged(self, session: Session) -> Evidence:
        """Some denoiser calls reused the residual."""
        return session.state(self, Decisions).evidence(type(self).__name__, may_never_reuse=self.threshold <= 0)

    def cost(self, target: Target, workload: Workload) -> Cost:
        """The saving depends on the pictures; memory is three copies of the streams a branch."""
        return Cost(time_factor=None, basis="measured")


def relative_change(value: torch.Tensor, anchor: torch.Tensor) -> torch.Tensor:
    """Relative L1 distance per sample, shape [batch], float32: mean|value - anchor| / mean|anchor|."""
    change = (value - anchor).abs().flatten(1).sum(1, dtype=torch.float32)
    return change / anchor.abs().flatten(1).sum(1, dtype=torch.float32).clamp_min(1e-12)
