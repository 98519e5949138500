"""Makes what quantization has put into a pipeline trainable, in one of two ways."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_bytes
from hasten.core.patch import Patch
from hasten.formats.lora import save_adapter
from hasten.kernels.adapted import AdaptedConv2d, AdaptedLinear, adapted
from hasten.kernels.modules import LowRank, Quantized
from hasten.quantize.engine.linear_quantizer import LinearQuantizer
from hasten.quantize.engine.sites import Site
from hasten.quantize.training.straight_through import StraightThrough

Quantizations = Iterable[tuple[LinearQuantizer, Site, Quantized]]
"""Each layer that is quantized: by what, where it was, and what is there now."""


class Trainable(ABC):
    """What is trained of a pipeline; `patch.close()` takes it off again."""

    @abstractmethod
    def parameters(self) -> list[torch.Tensor]:
        """The tensors to optimise, float32."""

    @abstractmethod
    def before_step(self) -> None:
        """Called before each use of the model."""

    @abstractmethod
    def save(self, path: str | Path) -> Path:
        """Write what was learnt; safetensors with diffusers' names."""


class TrainedAdapters(Trainable):
    """Adapters beside frozen codes (QLoRA, https://arxiv.org/abs/2305.14314).

    They begin as the best approximation of the rounding error in so many ranks (LoftQ,
    https://arxiv.org/abs/2310.08659), not at zero.
    """

    def __init__(self, layers: Quantizations, rank: int, patch: Patch) -> None:
        self._layers: dict[tuple[str, str], AdaptedLinear | AdaptedConv2d] = {}
        self._convolutions: set[tuple[str, str]] = set()
        for _, site, module in layers:
            made = adapted(module, error_in_ranks(site.weight, module, rank))
            made.down.requires_grad_()
            made.up.requires_grad_()
            patch.swap(site.parent, site.name, made, "has an adapter that is trained")
            self._layers[site.component, site.path] = made
            if site.is_conv:
                self._convolutions.add((site.component, site.path))

    def parameters(self) -> list[torch.Tensor]:
        """The matrices of all adapters."""
        return [matrix for layer in self._layers.values() for matrix in (layer.down, layer.up)]

    def before_step(self) -> None:
        """Codes stay as they are."""

    def save(self, path: str | Path) -> Path:
        """Write an adapter file that `LoRA`, diffusers and PEFT read."""
        return save_adapter(path, {key: self._matrices(key) for key in self._layers}, {"trained_by": "hasten"})

    def _matrices(self, key: tuple[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self._layers[key]
        if key in self._convolutions:
            return layer.down[:, :, None, None], layer.up[:, :, None, None]
        return layer.down, layer.up


class TrainedWeights(Trainable):
    """The weights themselves, rounded at each step as the quantizer does it (quantization-aware training)."""

    def __init__(self, layers: Quantizations, names: Mapping[str, Iterable[str]], patch: Patch) -> None:
        self._layers: dict[tuple[str, str], StraightThrough] = {}
        known = {component: set(paths) for component, paths in names.items()}
        for technique, site, module in layers:
            if f"{site.path}.weight" not in known[site.component]:
                raise HastenError(
                    f"{site.component}.{site.path} is no layer of the model itself, but one that another technique "
                    f"has made; train adapters (method='lora') instead."
                )
            made = StraightThrough(site, module, technique.quantize)
            patch.swap(site.parent, site.name, made, "has a weight that is trained")
            self._layers[site.component, site.path] = made

    def parameters(self) -> list[torch.Tensor]:
        """The weights."""
        return [layer.master for layer in self._layers.values()]

    def before_step(self) -> None:
        """Round the weights as they are now."""
        for layer in self._layers.values():
            layer.round()

    def save(self, path: str | Path) -> Path:
        """Write the weights before rounding, as `component.layer.weight`; quantized, they give the trained codes."""
        from safetensors.torch import save

        tensors = {f"{component}.{name}.weight": layer.master.detach().cpu().contiguous()
                   for (component, name), layer in self._layers.items()}  # fmt: skip
        return atomic_write_bytes(path, save(tensors, {"format": "pt", "trained_by": "hasten"}))


@torch.no_grad()
def error_in_ranks(weight: torch.Tensor, module: Quantized, rank: int) -> LowRank:
    """The rounding error of a layer in its `rank` greatest singular values, float32."""
    effective = module.effective().flatten(1)
    error = weight.to(effective.device).float().flatten(1) - effective
    size = min(rank, *error.shape)
    left, values, right = torch.svd_lowrank(error, q=min(size + 8, *error.shape), niter=4)
    root = values[:size].sqrt()
    return LowRank((right[:, :size] * root).T.contiguous(), (left[:, :size] * root).contiguous())
