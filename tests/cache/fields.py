"""Denoisers with known velocities, sampled by diffusers' own schedulers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.core.stand_ins import Pipeline

Velocity = Callable[[float, torch.Tensor], torch.Tensor]
"""From the timestep and the denoiser's input to the velocity noise - x0."""
SHAPE = (2, 4, 4, 4)


class Field(nn.Module):
    """Predicts what a velocity amounts to at the level of a timestep."""

    def __init__(self, predict: Callable[[float, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config: dict[str, Any] = {}
        self.predict, self.calls = predict, list[float]()

    def forward(self, hidden_states: torch.Tensor, timestep: Any, return_dict: bool = False) -> tuple[torch.Tensor]:
        """One prediction."""
        self.calls.append(float(timestep))
        return (self.predict(float(timestep), hidden_states),)


def noise(seed: int = 0) -> torch.Tensor:
    """Standard normal numbers in the shape of the pictures here."""
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def sampled(pipeline: Pipeline, steps: int, start: torch.Tensor | None = None, **step: Any) -> torch.Tensor:
    """One request from noise to picture, as a pipeline makes it."""
    scheduler = pipeline.scheduler
    scheduler.set_timesteps(steps)
    sample = noise() * getattr(scheduler, "init_noise_sigma", 1.0) if start is None else start
    for timestep in scheduler.timesteps:
        scaled = hasattr(scheduler, "scale_model_input")
        given = scheduler.scale_model_input(sample, timestep) if scaled else sample
        output = pipeline.denoiser(given, timestep)[0]
        sample = scheduler.step(output, timestep, sample, return_dict=False, **step)[0]
    return sample


def pipeline_of(scheduler: Any, predict: Callable[[float, torch.Tensor], torch.Tensor]) -> Pipeline:
    """A pipeline around a `Field`."""
    return Pipeline(scheduler, transformer=Field(predict))
