"""Techniques that do nothing but predict, and a small planned model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

from hasten.core.patch import Patch
from hasten.core.recipe import Recipe
from hasten.core.session import Session
from hasten.core.target import Target
from hasten.core.technique import Cost, Evidence, Stage, Technique
from hasten.core.workload import Workload
from hasten.search.predict import Profile, profile
from hasten.search.prediction.devices import Device
from hasten.search.prediction.ladder import Ladder, Rung
from hasten.search.prediction.model import planned_model


@dataclass(frozen=True, kw_only=True)
class Stub(Technique):
    """Applies to everything and changes one attribute."""

    stage: ClassVar[Stage] = Stage.STRUCTURE

    def problems(self, target: Target) -> Iterable[str]:
        return ()

    def apply(self, target: Target, patch: Patch) -> None:
        patch.set(target.denoisers[0].module, f"has_{type(self).__name__}", True, "is marked")

    def engaged(self, session: Session) -> Evidence:
        return Evidence(summary=f"{type(self).__name__} was there")

    def cost(self, target: Target, workload: Workload) -> Cost:
        return Cost(time_factor=1.0)


@dataclass(frozen=True, kw_only=True)
class InTurn(Stub):
    """All components take turns."""

    stage: ClassVar[Stage] = Stage.RESIDENCY

    def cost(self, target: Target, workload: Workload) -> Cost:
        return Cost(in_turn=tuple(target.modules))


@dataclass(frozen=True, kw_only=True)
class Streamed(Stub):
    """All components take turns, and of the denoiser a tenth is there at a time, moved in each call."""

    stage: ClassVar[Stage] = Stage.RESIDENCY

    def claims(self) -> tuple[str, ...]:
        return ("residency",)

    def cost(self, target: Target, workload: Workload) -> Cost:
        name = target.denoisers[0].name
        size = sum(w.numel() * w.element_size() for w in target.denoisers[0].module.parameters())
        return Cost(in_turn=tuple(target.modules), held={name: size // 10}, moved={name: size})


@dataclass(frozen=True, kw_only=True)
class Eighth(Stub):
    """Stores weights in 8 bits."""

    lossy: ClassVar[bool] = True

    def cost(self, target: Target, workload: Workload) -> Cost:
        name = target.denoisers[0].name
        size = sum(w.numel() * w.element_size() for w in target.denoisers[0].module.parameters())
        return Cost(held={name: size // 2}, traffic={name: size})


@dataclass(frozen=True, kw_only=True)
class Unknowable(Stub):
    """Says nothing about time."""

    def cost(self, target: Target, workload: Workload) -> Cost:
        return Cost(basis="measured")


@dataclass(frozen=True, kw_only=True)
class Whole(Stub):
    """Compiles everything into one piece."""

    stage: ClassVar[Stage] = Stage.COMPILE

    def cost(self, target: Target, workload: Workload) -> Cost:
        return Cost(compiled="whole")


PLAIN = Rung(Recipe())
LADDER = Ladder(
    (PLAIN,),
    (
        PLAIN,
        Rung(Recipe((InTurn(),)), "parts take turns"),
        Rung(Recipe((Eighth(),)), "weights are stored in 8 bits"),
        Rung(Recipe((Streamed(),)), "the denoiser passes through in every step"),
    ),
)
DEVICE = Device(
    name="even",
    title="a device of round numbers",
    memory=10**9,
    product={"half": 1e12, "float32": 1e12},
    attention={"half": 1e12, "float32": 1e12},
    convolution={"half": 1e12, "float32": 1e12},
    bandwidth=1e11,
    pass_share=1.0,
    fused_share=1.0,
    host_link=1e8,
    kernel_seconds=0.0,
)


@cache
def small() -> Profile:
    """The bundled FLUX model, profiled once."""
    return profile(planned_model("emoji-flux"))
