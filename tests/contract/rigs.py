"""Small pipelines of every architecture, so that the contract is written once and holds for all techniques."""

from __future__ import annotations

import copy
import itertools
from functools import cache
from typing import Any

import torch
from torch import nn

from hasten.core.intercept import base_class
from hasten.core.registry import specs, techniques
from hasten.core.session import Session, accelerate
from hasten.core.spec import DenoiserSpec, InputSize
from hasten.core.target import Target
from hasten.core.technique import Technique

ARCHITECTURES = tuple(specs())
TECHNIQUES = tuple(techniques())


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
        """Denoise random latents and decode three channels of them; `stop_at` raises in that step.

        Guidance is done as the architecture's pipelines do it: in one batch, in two calls, or not at all.
        """
        calls = self._calls(prompt)
        latents = _stacked(calls[0][self.spec.latents])[:1]
        self.scheduler.set_timesteps(steps, device=self.device)
        for index, timestep in enumerate(self.scheduler.timesteps):
            if index == stop_at:
                raise InterruptedError
            output = self._guided([self._output(given, latents, timestep) for given in calls])
            latents = self.scheduler.step(output[:, : latents.shape[1]], timestep, latents, return_dict=False)[0]
        two = latents.flatten()[:256].reshape(1, 4, 8, 8).repeat(2, 1, 1, 1)
        picture = self.vae.decode(two, return_dict=False)[0]  # pyright: ignore
        return torch.cat([latents.flatten(), picture.flatten()])

    def _calls(self, prompt: int) -> list[dict[str, Any]]:
        """The arguments of each call of a step."""
        size = InputSize(batch=2 if self.spec.guidance == "batched" else 1)
        seeds = (prompt, prompt + 1000) if self.spec.guidance == "separate" else (prompt,)
        made = [self.spec.example(self.denoiser.config, size, seed) for seed in seeds]  # pyright: ignore
        return [moved(given, self.device) for given in made]

    def _output(self, given: dict[str, Any], latents: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        name, count = self.spec.latents, len(given[self.spec.latents])
        batch = latents.expand(count, *latents.shape[1:]).clone() if count > 1 else latents
        picture = list(batch) if isinstance(given[name], list) else batch
        time = {self.spec.timestep: timestep.expand(count)}
        return _stacked(self.call({**given, name: picture, **time}))

    def _guided(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        parts = [part for output in outputs for part in output.split(1)]
        if len(parts) == 1:
            return parts[0]
        conditional, unconditional = parts if self.spec.conditional == "first" else parts[::-1]
        return unconditional + 2.0 * (conditional - unconditional)

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


def covering(name: str) -> tuple[str, ...]:
    """The architectures that a technique is tried on in every run of the tests: a U-Net, a DiT and one in turn.

    `make table` tries all of them.
    """
    always = ("stable_diffusion", "dit")
    others = [architecture for architecture in ARCHITECTURES if architecture not in always]
    return (*always, others[TECHNIQUES.index(name) % len(others)])


def scheduler_state(rig: Rig) -> set[str]:
    """Attribute names of the scheduler; using it adds some, hasten must not."""
    return set(rig.scheduler.__dict__)


def original_class(obj: object) -> type:
    """An object's class before interception."""
    return base_class(obj)
