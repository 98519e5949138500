"""Keeps one component on the GPU at a time: text encoders leave before denoising, the VAE comes for decoding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hasten.core.patch import Patch
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique, about
from hasten.core.workload import Workload
from hasten.memory.engine.moving import (
    Moved,
    Movement,
    chosen_components,
    execution_device,
    movement_problems,
    pinned_bytes,
    set_up,
)


@dataclass(frozen=True, kw_only=True)
class OneAtATime(Technique):
    """Has text encoders, denoiser and VAE on the GPU only while they run, each as a whole.

    The first thing to try when a pipeline does not fit: of FLUX.1 (34 GB in bfloat16) the GPU then holds 24 GB,
    nothing is computed differently, and an image pays for moving each component once. `stay` names small components
    that need not leave.
    """

    stage: ClassVar[Stage] = Stage.RESIDENCY
    paper: ClassVar[str] = "https://huggingface.co/docs/diffusers/optimization/memory"

    stay: tuple[str, ...] = field(
        default=(), metadata=about("components that always stay on the device, by name or pattern")
    )
    pinned: str = field(
        default="auto",
        metadata=about("page-locked host memory to take at most, such as '8GB'; auto is half of the machine's memory"),
    )
    device: str = field(
        default="auto", metadata=about("where to compute: auto, cuda, cuda:1, or cpu for a rehearsal", trial="cpu")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        pinned_bytes(self.pinned)

    def claims(self) -> tuple[str, ...]:
        """The placement of all components."""
        return ("residency",)

    def runs_on(self, target: Target) -> torch.device | None:
        """Where components are brought to."""
        return None if target.device.type == "meta" else execution_device(self.device, target)

    def problems(self, target: Target) -> Iterable[str]:
        """Needs several components and a GPU."""
        names = self._leaving(target)
        if len(names) < 2 and target.device.type != "meta":
            yield f"{target.title} has fewer than two components that could take turns; use Offload(kind='blocks')."
        else:
            yield from movement_problems(target, names or target.modules, self.device)

    def apply(self, target: Target, patch: Patch) -> None:
        """Send components home and intercept their calls."""
        movement = Movement("model", execution_device(self.device, target), pinned=pinned_bytes(self.pinned))
        set_up(target, self._leaving(target), movement, patch)

    def engaged(self, session: Session) -> Evidence:
        """Components really were moved."""
        return session.state(self, Moved).evidence()

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Memory: one component at a time. Time: each comes by once an image."""
        return Cost(in_turn=tuple(self._leaving(target)))

    def _leaving(self, target: Target) -> list[str]:
        staying = set(chosen_components(target, self.stay))
        return [name for name in chosen_components(target, ("*",)) if name not in staying]
