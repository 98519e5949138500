"""DeepCache: on most steps compute only the outer part of a U-Net; its deep features change slowly."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from hasten.cache.problems import no_unet
from hasten.cache.runtime import BranchStore, Decisions
from hasten.cache.unet_stages import ShallowRun, cuts, obstacles
from hasten.cache.work import example_call, flops, stand_in
from hasten.core.clock import Clock
from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Denoiser, Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload


@dataclass(frozen=True, kw_only=True)
class DeepCache(Technique):
    """Computes everything at every `interval`-th step of a request, and only the outer layers at the others.

    At those the deep feature of the last complete step stands in for the rest of the U-Net. `branch` counts the
    skip connections from the outside in, as in the paper's code: with 3 layers per up stage, branch 4 is layer 1
    of stage 1. Memory is one feature map per guidance branch. Every guidance branch has a state of its own; a
    change of batch, size, dtype or kind of conditioning computes, and so does a T2I-Adapter.
    """

    stage: ClassVar[Stage] = Stage.CACHE
    lossy: ClassVar[bool] = True
    paper: ClassVar[str] = "DeepCache: Accelerating Diffusion Models for Free (CVPR 2024), arXiv:2312.00858"

    interval: int = field(default=3, metadata=about("every how many steps all is computed", ge=1, off=1))
    branch: int = field(
        default=0, metadata=about("skip connection to cut at; 0 computes least, the largest reuses least", ge=0)
    )

    def claims(self) -> tuple[str, ...]:
        """Decides which blocks are computed."""
        return ("stack.compute:*",)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a U-Net of known stages that has the branch."""
        yield from no_unet(target)
        for denoiser in target.denoisers:
            if denoiser.spec.unet is None:
                continue
            found = list(obstacles(denoiser))
            yield from found
            if not found and self.branch >= (count := len(cuts(denoiser))):
                yield f"this U-Net has no branch {self.branch}; choose one from 0 to {count - 1}."

    def apply(self, target: Target, patch: Patch) -> None:
        """Install the shallow run on every U-Net."""
        decisions = patch.keep(Decisions())
        for denoiser in target.denoisers:
            run = ShallowRun(denoiser, cuts(denoiser)[self.branch])
            runner = _Runner(denoiser, run, self.interval, patch.clock, decisions)
            patch.around(denoiser.module, runner, f"computes everything once in {self.interval} steps")
            run.install(patch)

    def engaged(self, session: Session) -> Evidence:
        """Some denoiser calls started from the kept feature."""
        return session.state(self, Decisions).evidence(type(self).__name__, may_never_reuse=self.interval == 1)

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Time is the mean share of operations: (1 + (interval - 1) * shallow share) / interval."""
        denoiser = stand_in(target.denoisers[0])
        arguments = example_call(denoiser, target, workload)
        run, patch = ShallowRun(denoiser, cuts(denoiser)[self.branch]), Patch({}, Clock)
        run.install(patch)
        run.keep()
        full, feature = flops(denoiser, arguments), run.feature
        assert feature is not None
        run.rest()
        run.reuse(feature)
        share = flops(denoiser, arguments) / full
        branches = 2 if denoiser.spec.guidance == "separate" else 1
        return Cost(
            time_factor=(1 + (self.interval - 1) * share) / self.interval,
            extra_bytes=branches * feature.numel() * feature.element_size(),
        )


class _Kept:
    """One guidance branch: the deep feature of its last complete step, and for which kind of call it is right."""

    def __init__(self) -> None:
        self.feature: torch.Tensor | None = None
        self.kind: tuple[Any, ...] = ()


class _Runner:
    """Decides for one U-Net before each call; the whole decision is known on the host."""

    def __init__(self, denoiser: Denoiser, run: ShallowRun, interval: int, clock: Clock, decisions: Decisions) -> None:
        self._name, self._run, self._interval = denoiser.name, run, interval
        self._clock, self._decisions = clock, decisions
        self._signature = inspect.signature(denoiser.module.forward)
        self._store = BranchStore(_Kept)

    def __call__(self, call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        moment = self._clock.now
        kept = self._store.at(self._name, moment)
        arguments = self._signature.bind_partial(*args, **kwargs).arguments
        kind = _kind(arguments)
        self._prepare(kept, kind, scheduled=moment.step % self._interval == 0, adapted=_has_adapter(arguments))
        try:
            output = call(*args, **kwargs)
            if not self._run.served:
                kept.feature, kept.kind = self._run.feature, kind
            if moment.last:
                kept.feature = None  # the memory is wanted for decoding the picture
            self._decisions.record(self._name, moment, full=not self._run.served)
        finally:
            self._run.rest()
        return output

    def _prepare(self, kept: _Kept, kind: tuple[Any, ...], *, scheduled: bool, adapted: bool) -> None:
        if not scheduled and kept.feature is not None and kept.kind == kind:
            self._run.reuse(kept.feature)
            return
        kept.feature = None
        if self._interval > 1 and not adapted:
            self._run.keep()


def _kind(arguments: Mapping[str, Any]) -> tuple[Any, ...]:
    """What must not change between keeping and reusing: the picture's shape, and which arguments are given."""
    sample = arguments["sample"]
    names = frozenset(name for name, value in arguments.items() if value is not None)
    return sample.shape, sample.dtype, sample.device, names


def _has_adapter(arguments: Mapping[str, Any]) -> bool:
    """A T2I-Adapter adds to the output of every down stage, in its present or its older form."""
    if arguments.get("down_intrablock_additional_residuals") is not None:
        return True
    residuals, middle = arguments.get("down_block_additional_residuals"), arguments.get("mid_block_additional_residual")
    return residuals is not None and middle is None
