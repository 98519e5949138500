"""The target: what is there to accelerate - pipeline, denoisers, VAE, text encoders, scheduler - and its names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import nn

from hasten.core.errors import HastenError, UnknownName
from hasten.core.intercept import base_class
from hasten.core.registry import specs
from hasten.core.spec import DenoiserSpec, Released, Stack, unknown_spec


@dataclass(frozen=True)
class Denoiser:
    """One denoising network of a pipeline (Wan 2.2 has two) with the specification of its architecture."""

    name: str
    module: nn.Module
    spec: DenoiserSpec

    def stack(self, stack: Stack) -> nn.ModuleList:
        """The module list a stack of the specification stands for."""
        return cast(nn.ModuleList, self.module.get_submodule(stack.path))

    def of_class(self, *names: str) -> Iterator[tuple[str, nn.Module]]:
        """Yield path and module of every sub-module whose class (before interception) has one of these names."""
        for path, module in self.module.named_modules():
            if base_class(module).__name__ in names:
                yield path, module


class Target:
    """What a recipe is applied to. Build it with `Target.of` (live objects) or `Target.planned` (no weights)."""

    def __init__(self, pipeline: object | None, denoisers: tuple[Denoiser, ...], title: str) -> None:
        self.pipeline, self.denoisers, self.title = pipeline, denoisers, title

    @classmethod
    def of(cls, subject: object) -> Target:
        """Describe a diffusers pipeline or a bare denoiser (`nn.Module`); anything else is an error."""
        if isinstance(subject, nn.Module):
            return cls(None, (_denoiser("denoiser", subject),), base_class(subject).__name__)
        components = getattr(subject, "components", None)
        if not isinstance(components, dict):
            raise HastenError(f"hasten accelerates a diffusers pipeline or a denoiser, not {type(subject).__name__}.")
        found = cast("dict[str, Any]", components)
        denoisers = tuple(
            _denoiser(name, module)
            for name in ("transformer", "transformer_2", "unet", "prior")
            if isinstance(module := found.get(name), nn.Module)
        )
        if not denoisers:
            raise HastenError(f"{type(subject).__name__} has no denoiser (transformer or unet) to accelerate.")
        return cls(subject, denoisers, base_class(subject).__name__)

    @classmethod
    def planned(cls, name: str) -> Target:
        """Describe a released model by name on the meta device: nothing is loaded or downloaded."""
        spec, released = find_released(name)
        # Not the model's own `to`, which warns of weights that a run should keep in float32.
        model = nn.Module.to(spec.build(released.config, device="meta"), torch.bfloat16)
        return cls(None, (Denoiser("denoiser", model, spec),), name)

    @property
    def components(self) -> dict[str, Any]:
        """The pipeline's components by name; a bare denoiser has only itself."""
        if self.pipeline is None:
            return {denoiser.name: denoiser.module for denoiser in self.denoisers}
        return cast("dict[str, Any]", getattr(self.pipeline, "components", {}))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The components that are networks."""
        return {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}

    @property
    def scheduler(self) -> object | None:
        """The pipeline's scheduler, if there is one."""
        return cast("object | None", self.components.get("scheduler"))

    @property
    def vae(self) -> nn.Module | None:
        """The pipeline's VAE, if there is one."""
        vae = self.components.get("vae")
        return vae if isinstance(vae, nn.Module) else None

    @cached_property
    def device(self) -> torch.device:
        """Where the first denoiser runs (`meta` when only planned)."""
        # accelerate's offloading keeps the weights elsewhere between calls, even on the meta device.
        hooks = (getattr(module, "_hf_hook", None) for module in self.denoisers[0].module.modules())
        places = (getattr(hook, "execution_device", None) for hook in hooks if hook is not None)
        place = next((place for place in places if place is not None), self._weight.device)
        return torch.device(place)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the first denoiser's weights."""
        return self._weight.dtype

    @property
    def _weight(self) -> torch.Tensor:
        weight = next(self.denoisers[0].module.parameters(), None)
        if weight is None:
            raise HastenError(f"{self.title} has no weights, so it is no denoiser.")
        return weight

    @cached_property
    def architecture(self) -> str:
        """Name of the first denoiser's specification."""
        return self.denoisers[0].spec.name

    def running_on(self, device: torch.device) -> Target:
        """The same target, computing on a device that its weights are brought to."""
        moved = Target(self.pipeline, self.denoisers, self.title)
        moved.__dict__["device"] = device
        return moved

    def names(self) -> dict[int, str]:
        """Map `id(object)` to a readable path for every component and sub-module."""
        found = {id(self.pipeline): "pipeline"} if self.pipeline is not None else {}
        found |= {id(part): name for name, part in self.components.items()}
        for name, module in self.modules.items():
            for path, child in module.named_modules():
                found.setdefault(id(child), f"{name}.{path}" if path else name)
        return found


def _denoiser(name: str, module: nn.Module) -> Denoiser:
    if hasattr(module, "_orig_mod"):
        raise HastenError(
            f"The {name} is wrapped by torch.compile, which hides its blocks; use the model inside ({name}._orig_mod) "
            f"and add CompileBlocks() to the recipe."
        )
    return Denoiser(name, module, spec_of(module))


def spec_of(module: nn.Module) -> DenoiserSpec:
    """The specification registered for a denoiser's class, or a stand-in for an unknown architecture.

    Architectures that share a class (Stable Diffusion 1.5 and SDXL) are told apart by their configuration.
    """
    name = base_class(module).__name__
    matching = [spec for spec in specs().values() if spec.model_class == name]
    if not matching:
        return unknown_spec(module)
    config = cast("dict[str, Any]", dict(getattr(module, "config", {})))
    return max(matching, key=lambda spec: _likeness(spec, config))


def _likeness(spec: DenoiserSpec, config: dict[str, Any]) -> int:
    """How many settings that name a structural choice (strings) the specification's test model shares."""
    texts = {key: value for key, value in spec.tiny.items() if isinstance(value, str)}
    return sum(1 if config.get(key) == value else -1 for key, value in texts.items())


def find_released(name: str) -> tuple[DenoiserSpec, Released]:
    """Look a released model up by name over all architectures."""
    known = {model: (spec, entry) for spec in specs().values() for model, entry in spec.released.items()}
    folded = {model.casefold(): model for model in known}
    if name.casefold() not in folded:
        raise UnknownName("released model", name, known)
    return known[folded[name.casefold()]]


def released_models() -> list[str]:
    """Names of all released models that can be planned without a download."""
    return [model for spec in specs().values() for model in spec.released]
