"""The layers of a pipeline that a quantizer may take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import nn

from hasten.core.away import taken_away
from hasten.core.intercept import base_class
from hasten.core.target import Target
from hasten.kernels.prepared import PreparedLinear, raw_weight

FLOATING = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Site:
    """One layer with its place in a component."""

    component: str
    path: str
    """Of the layer, relative to the component."""
    parent: nn.Module
    layer: nn.Linear | nn.Conv2d
    """The layer that is quantized: the inner one, if what stands in the place prepares its input."""
    wrapper: PreparedLinear | None = None
    """What stands in the place, if it prepares the input of `layer`."""

    @property
    def name(self) -> str:
        """Its name in the parent."""
        return self.path.rpartition(".")[2]

    @property
    def weight(self) -> torch.Tensor:
        """The weight, without gradient."""
        return self.layer.weight.detach()

    @property
    def raw_weight(self) -> torch.Tensor:
        """The weight for inputs of the place as they come, without smoothing and rotation: float32."""
        if self.wrapper is None:
            return self.weight.float()
        return raw_weight(self.weight, self.wrapper.smooth, self.wrapper.rotation)

    @property
    def present(self) -> nn.Module:
        """What stands in the place; its inputs are those of the network."""
        return self.wrapper or self.layer

    @property
    def is_conv(self) -> bool:
        """Is it a convolution?"""
        return isinstance(self.layer, nn.Conv2d)


def chosen_components(target: Target, patterns: Iterable[str]) -> list[str]:
    """Names of the components that match one of the patterns."""
    return [name for name in target.modules if any(fnmatchcase(name, pattern) for pattern in patterns)]


def sites(
    target: Target,
    components: Iterable[str],
    skip: Iterable[str],
    convolutions: bool = False,
    *,
    everywhere: bool = False,
) -> list[Site]:
    """The linears (and 1 x 1 convolutions) in the blocks of components, less those that match `skip`.

    A linear whose input is prepared (smoothed, rotated) counts as one site; its `layer` is the one with the weight.
    What stands outside of numbered blocks - embeddings, the first and the last projection - is taken only if
    `everywhere` is set. Never taken are adapters (LoRA), layers that the model wants in float32, weights that another
    technique has taken over, and layers whose inputs or outputs are no multiple of 8, of which neither packed rows
    nor products of 8 bits can be made.
    """
    names, left_out = chosen_components(target, components), tuple(skip)
    found = (site for name in names for site in _in(target, name, left_out, convolutions))
    return [site for site in found if everywhere or in_block(site.path)]


def in_block(path: str) -> bool:
    """Is a layer of that path in a numbered block?"""
    return any(part.isdigit() for part in path.split("."))


def obstacles(component: str, found: list[Site]) -> Iterator[str]:
    """Why layers of a component, as they are now, can be neither rotated nor quantized."""
    if not found:
        yield f"the {component} has no linear layers in blocks to work on."
    kinds = {str(site.weight.dtype) for site in found if site.weight.dtype not in FLOATING}
    kinds |= {type(site.layer.weight.data).__name__ for site in found} - {"Tensor"}
    if kinds:
        yield f"weights of the {component} are of type {' and '.join(sorted(kinds))} and cannot be quantized again."
    if any(hasattr(site.layer, "_hf_hook") or hasattr(site.layer, "_diffusers_hook") for site in found):
        yield f"the layers of the {component} carry hooks of accelerate or diffusers; take those off first."


def _in(target: Target, component: str, skip: tuple[str, ...], convolutions: bool) -> Iterator[Site]:
    network = target.modules[component]
    away = {id(tensor) for tensor in taken_away(network)}
    wide = set(cast("Iterable[str]", getattr(network, "_keep_in_fp32_modules", None) or ()))
    inner = {id(module.linear) for module in network.modules() if isinstance(module, PreparedLinear)}
    for path, module in network.named_modules():
        wrapper = module if isinstance(module, PreparedLinear) else None
        layer = wrapper.linear if wrapper else module
        parts = path.split(".")
        if not _takes(layer, convolutions) or wide.intersection(parts):
            continue
        if id(module) in inner or id(layer.weight) in away:
            continue
        if any(fnmatchcase(path, pattern) for pattern in ("*lora_*", *skip)):
            continue
        parent = network.get_submodule(path.rpartition(".")[0])
        yield Site(component, path, parent, cast(nn.Linear, layer), wrapper)


def _takes(layer: nn.Module, convolutions: bool) -> bool:
    kind = base_class(layer)
    if kind is nn.Conv2d:
        return convolutions and _pointwise(cast(nn.Conv2d, layer)) and _even(layer)
    return kind is nn.Linear and _even(layer)


def _pointwise(layer: nn.Conv2d) -> bool:
    return layer.kernel_size == (1, 1) and layer.groups == 1 and layer.stride == (1, 1) and layer.padding == (0, 0)


def _even(layer: nn.Module) -> bool:
    outputs, inputs = cast(torch.Tensor, layer.weight).shape[:2]
    return outputs % 8 == 0 and inputs % 8 == 0
