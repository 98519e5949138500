"""Stand-ins for pipelines: real schedulers and clocks around a denoiser that costs nothing."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.cache_utils import CacheMixin
from torch import nn

from hasten.core.clock import Clock, Moment
from hasten.core.patch import Patch
from hasten.core.registry import specs
from hasten.core.target import Target
from tests.contract.rigs import Rig


class Network(CacheMixin, nn.Module):
    """A denoiser with the interface of diffusers' own, and with its real `cache_context`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((1,), 0.1))
        self.config: dict[str, Any] = {}

    def forward(self, sample: torch.Tensor, timestep: Any, return_dict: bool = False) -> tuple[torch.Tensor]:
        return (sample * self.weight,)


class Pipeline:
    """Components and a scheduler, as a diffusers pipeline has them."""

    def __init__(self, scheduler: Any, **networks: nn.Module) -> None:
        self.scheduler = scheduler
        self.networks = networks or {"transformer": Network()}

    @property
    def components(self) -> dict[str, Any]:
        return {**self.networks, "scheduler": self.scheduler}

    @property
    def denoiser(self) -> Any:
        return next(iter(self.networks.values()))

    @torch.no_grad()
    def request(
        self, steps: int, *, calls: int = 1, contexts: tuple[str, ...] = (), begin: int = 0, stop_at: int | None = None
    ) -> None:
        """Denoise as a pipeline does: `calls` calls a step, or one in each of `contexts`."""
        self.scheduler.set_timesteps(steps)
        if begin:
            self.scheduler.set_begin_index(begin)
        sample = torch.ones(1, 4, 4, 4)
        for index, timestep in enumerate(self.scheduler.timesteps[begin:]):
            if index == stop_at:
                return
            output = self.call(sample, timestep, calls, contexts)
            sample = self.scheduler.step(output, timestep, sample, return_dict=False)[0]

    def call(self, sample: torch.Tensor, timestep: torch.Tensor, calls: int, contexts: tuple[str, ...]) -> torch.Tensor:
        """All denoiser calls of one step."""
        given = sample if not hasattr(self.scheduler, "scale_model_input") else self.scaled(sample, timestep)
        output = given
        for _ in range(0 if contexts else calls):
            output = self.denoiser(given, timestep)[0]
        for context in contexts:
            with self.denoiser.cache_context(context):
                output = self.denoiser(given, timestep)[0]
        return output

    def scaled(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """What the scheduler feeds the denoiser."""
        return self.scheduler.scale_model_input(sample, timestep)


@contextmanager
def clocked(subject: object) -> Generator[tuple[Clock, Patch, Patch]]:
    """A clock on a pipeline, its own patch, and the patch of a technique; the latter is closed first."""
    target, clock = Target.of(subject), Clock()
    own, technique = (Patch(target.names(), lambda: clock) for _ in range(2))
    clock.install(target, own)
    try:
        yield clock, own, technique
    finally:
        technique.close()
        own.close()


@contextmanager
def watched(subject: object) -> Generator[list[Moment]]:
    """Install a clock on a pipeline or denoiser; yields the moments of all calls, as they come."""
    target, clock = Target.of(subject), Clock()
    patch = Patch(target.names(), lambda: clock)
    clock.install(target, patch)
    seen: list[Moment] = []

    def note(call: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(clock.now)
        return call(*args, **kwargs)

    for denoiser in target.denoisers:
        patch.around(denoiser.module, note, "is watched")
    try:
        yield seen
    finally:
        patch.close()


def steps_of(moments: list[Moment]) -> list[int]:
    """The step of each moment."""
    return [moment.step for moment in moments]


def branches_of(moments: list[Moment]) -> list[str]:
    """The branch of each moment."""
    return [moment.branch for moment in moments]


def requests_of(moments: list[Moment]) -> list[int]:
    """The requests of the moments, numbered from 0 in order of appearance."""
    order = list(dict.fromkeys(moment.request for moment in moments))
    return [order.index(moment.request) for moment in moments]


def sized_flux(double: int, single: int) -> Rig:
    """A pipeline around a FLUX with so many double-stream and single-stream blocks, and no VAE."""
    spec = specs()["flux"]
    return Rig(spec, spec.build({**spec.tiny, "num_layers": double, "num_single_layers": single}), nn.Identity())
