"""Small pipelines of every architecture, so that the contract is written once and holds for all techniques."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from hasten.core.intercept import base_class
from hasten.core.registry import specs, techniques
from hasten.core.session import Session, accelerate
from hasten.core.spec import DenoiserSpec
from hasten.core.target import Target
from hasten.core.technique import Technique

ARCHITECTURES = tuple(specs())
TECHNIQUES = tuple(techniques())
LATENTS = ("hidden_states", "sample", "x")


class Rig:
    """A pipeline reduced to what matters here: denoiser, scheduler and VAE, driven through real diffusers objects."""

    def __init__(self, spec: DenoiserSpec, denoiser: nn.Module, vae: nn.Module) -> None:
        from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

        self.spec, self.denoiser, self.vae = spec, denoiser, vae
        self.scheduler: Any = FlowMatchEulerDiscreteScheduler() if spec.unet is None else DDIMScheduler()
        slot = "unet" if spec.unet else "transformer"
        self.components: dict[str, Any] = {slot: denoiser, "scheduler": self.scheduler, "vae": vae}

    @torch.no_grad()
    def run(self, *, steps: int = 4, prompt: int = 0, stop_at: int | None = None) -> torch.Tensor:
        """Denoise random latents and decode three channels of them; `stop_at` raises in that step."""
        inputs = moved(self.spec.example(self.denoiser.config, seed=prompt), self.device)  # pyright: ignore
        name = next(key for key in LATENTS if key in inputs)
        latents = _stacked(inputs[name])
        self.scheduler.set_timesteps(steps, device=self.device)
        for index, timestep in enumerate(self.scheduler.timesteps):
            if index == stop_at:
                raise InterruptedError
            given = list(latents) if isinstance(inputs[name], list) else latents
            time = {self.spec.timestep: timestep.expand(latents.shape[0])}
            output = _stacked(self.call({**inputs, name: given, **time}))
            latents = self.scheduler.step(output[:, : latents.shape[1]], timestep, latents, return_dict=False)[0]
        picture = self.vae.decode(latents.flatten()[:256].reshape(1, 4, 8, 8), return_dict=False)[0]  # pyright: ignore
        return torch.cat([latents.flatten(), picture.flatten()])

    def call(self, arguments: dict[str, Any]) -> Any:
        """One denoiser call; a test may replace this to watch it."""
        return self.denoiser(**arguments, return_dict=False)[0]

    @property
    def device(self) -> torch.device:
        """Where the denoiser is."""
        return next(self.denoiser.parameters()).device

    def to(self, device: str) -> Rig:
        """Move the networks."""
        self.denoiser.to(device)
        self.vae.to(device)
        return self

    def accelerated(self, *recipe: Technique) -> Session:
        """Apply techniques to this pipeline."""
        from hasten.core.recipe import Recipe

        return accelerate(self, Recipe(recipe))


def moved(value: Any, device: torch.device) -> Any:
    """Arguments of a call with all tensors on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}  # pyright: ignore
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)  # pyright: ignore
    return value


def _stacked(value: Any) -> torch.Tensor:
    return torch.stack(value) if isinstance(value, list) else value


@cache
def _models(architecture: str) -> tuple[nn.Module, nn.Module]:
    from diffusers import AutoencoderKL

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, latent_channels=4).eval()
    return specs()[architecture].build_tiny(), vae


def make(architecture: str) -> Rig:
    """A fresh pipeline of an architecture (a copy of one built once)."""
    denoiser, vae = _models(architecture)
    return Rig(specs()[architecture], copy.deepcopy(denoiser), copy.deepcopy(vae))


@cache
def plain_output(architecture: str, *, steps: int = 4, prompt: int = 0) -> torch.Tensor:
    """What an untouched pipeline makes."""
    return make(architecture).run(steps=steps, prompt=prompt)


def trial(name: str) -> Technique:
    """A technique with settings that surely take effect on a test model."""
    return techniques()[name].trial()


def refusals(technique: Technique, rig: Rig) -> list[str]:
    """Why a technique refuses this pipeline."""
    return list(technique.problems(Target.of(rig)))


def fingerprint(rig: Rig) -> list[tuple[Any, ...]]:
    """Everything that a technique could leave behind: classes, attributes, parameters and their strides."""
    found: list[tuple[Any, ...]] = [(type(rig.scheduler), sorted(rig.scheduler.__dict__))]
    for part in (rig.denoiser, rig.vae):
        for path, module in part.named_modules():
            found.append((path, type(module), sorted(module.__dict__), id(module)))
        for path, parameter in itertools.chain(part.named_parameters(), part.named_buffers()):
            found.append((path, id(parameter), parameter.shape, parameter.stride(), parameter.dtype))
    return found


def scheduler_state(rig: Rig) -> set[str]:
    """Attribute names of the scheduler; using it adds some, hasten must not."""
    return set(rig.scheduler.__dict__)


def pairs() -> Iterator[tuple[str, str]]:
    """Every unordered pair of different techniques."""
    return itertools.combinations(TECHNIQUES, 2)


def original_class(obj: object) -> type:
    """An object's class before interception."""
    return base_class(obj)
