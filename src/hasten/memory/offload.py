"""Keeps weights in host memory or on disk and brings them to the GPU when they are needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

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
from hasten.memory.engine.units import Cut, cut


@dataclass(frozen=True, kw_only=True)
class Offload(Technique):
    """Keeps weights in host memory or in files, and on the GPU only what is being computed with.

    `model` moves whole components, which take turns; `blocks` also moves the blocks of denoisers and text encoders,
    in groups, one after the other; `leaf` moves every layer by itself, which needs least memory and most time. Copies
    run beside the computation on a stream of their own, and the next weights are fetched ahead - but only those that
    are sure to be needed: blocks that a cache leaves out are never moved. Compiled blocks are moved in one piece.
    """

    stage: ClassVar[Stage] = Stage.RESIDENCY
    paper: ClassVar[str] = "https://huggingface.co/docs/diffusers/optimization/memory"

    kind: Literal["model", "blocks", "leaf"] = field(
        default="model",
        metadata=about("what moves at a time: whole components, groups of blocks, or layers", trial="blocks"),
    )
    group: int = field(default=1, metadata=about("blocks that move together (kind='blocks')", ge=1))
    ahead: int = field(default=1, metadata=about("groups or layers that are fetched before they are needed", ge=0))
    pinned: str = field(
        default="auto",
        metadata=about("page-locked host memory to take at most, such as '8GB'; auto is half of the machine's memory"),
    )
    disk: str = field(default="", metadata=about("an existing folder for the weights, instead of host memory"))
    components: tuple[str, ...] = field(
        default=("*",), metadata=about("the components that move, by name or pattern; the others stay where they are")
    )
    device: str = field(
        default="auto", metadata=about("where to compute: auto, cuda, cuda:1, or cpu for a rehearsal", trial="cpu")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        pinned_bytes(self.pinned)

    def claims(self) -> tuple[str, ...]:
        """The placement of the components."""
        return tuple(f"residency:{pattern}" for pattern in self.components)

    def runs_on(self, target: Target) -> torch.device | None:
        """Where weights are brought to, if the denoiser is among what moves."""
        names = chosen_components(target, self.components)
        moves = target.device.type != "meta" and target.denoisers[0].name in names
        return execution_device(self.device, target) if moves else None

    def problems(self, target: Target) -> Iterable[str]:
        """Needs a GPU, movable weights, and room on disk if that is asked for."""
        yield from movement_problems(target, self.components, self.device, self.disk)

    def apply(self, target: Target, patch: Patch) -> None:
        """Send weights home and intercept calls."""
        names = chosen_components(target, self.components)
        movement = Movement(
            self.kind,
            execution_device(self.device, target),
            self.group,
            self.ahead,
            pinned_bytes(self.pinned),
            Path(self.disk) if self.disk else None,
        )
        set_up(target, names, movement, patch)

    def engaged(self, session: Session) -> Evidence:
        """Weights really were moved."""
        return session.state(self, Moved).evidence()

    def cost(self, target: Target, workload: Workload) -> Cost:
        """Memory: of each component what is there at one time, while it runs. Time: copies run beside computing."""
        names = chosen_components(target, self.components)
        parts = {name: cut(target, name, self.kind, self.group) for name in names}
        passing = {name: sum(unit.bytes for unit in found.passing) for name, found in parts.items()}
        return Cost(
            in_turn=tuple(names),
            held={name: self._most(found) for name, found in parts.items() if passing[name]},
            moved={name: size for name, size in passing.items() if size},
        )

    def _most(self, parts: Cut) -> int:
        passing = sorted((unit.bytes for unit in parts.passing), reverse=True)
        return parts.rest.bytes + sum(passing[: 1 + self.ahead])
