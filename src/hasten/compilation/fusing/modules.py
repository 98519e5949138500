"""What the executors of blocks, attention and feed-forward have in common: finding parts, and handing codes on."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from hasten.core.intercept import base_class
from hasten.kernels.coded import Coded, Coding, gains
from hasten.kernels.modules import QuantizedLinear
from hasten.kernels.residual import Norm

_LAYER, _RMS = ("LayerNorm", "FP32LayerNorm"), ("RMSNorm",)


_NUMBERS = {"int8": "int8", "float8": "float8_e4m3fn"}
"""Kinds of rounded activations, and the weights they are multiplied with code by code."""


def part(module: nn.Module, path: str) -> Any:
    """What is at a path inside a module now; other techniques may have replaced it."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found


def norm_of(module: Any) -> Norm:
    """A norm module's kind and numbers."""
    kind = "layer" if base_class(module).__name__ in _LAYER else "rms"
    eps = module.eps if module.eps is not None else torch.finfo(torch.float32).eps
    return Norm(kind, eps, module.weight, getattr(module, "bias", None))


def is_norm(module: Any) -> bool:
    """Is it a norm over the channels that the kernels know?"""
    return base_class(module).__name__ in (*_LAYER, *_RMS)


def parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of what a module's `forward` takes."""
    return tuple(inspect.signature(base_class(module).forward).parameters)[1:]  # pyright: ignore


def by_name(names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def empty(value: Any) -> bool:
    """Does an argument say nothing?"""
    return value is None or (isinstance(value, dict) and not value)


def coding_of(layers: Sequence[Any], device: torch.device) -> Coding | None:
    """How the common input of some layers may be rounded beforehand; None where they need it as it is.

    They need it where one is not quantized, rounds otherwise than the others or with a fixed scale, has scales of
    groups, or a side branch, which works on the unrounded input; and it is left to them where nothing is gained.
    """
    found = [_coding(layer) for layer in layers]
    first = found[0]
    if first is None or not gains(first.kind, device):
        return None
    return first if all(one is not None and _alike(one, first) for one in found) else None


def _coding(layer: Any) -> Coding | None:
    layer = getattr(layer, "computed_by", layer)
    if not isinstance(layer, QuantizedLinear):
        return None
    scale = cast(torch.Tensor, layer.scale)
    if _NUMBERS.get(layer.activations) != layer.number:
        return None
    parts = (layer.down, layer.input_scale, layer.minimum, layer.zero, layer.compute, layer.threshold or None)
    rows = layer.columns == layer.shape[1] and layer.shape[1] % 32 == 0 and scale.shape[1] == 1
    if not rows or any(one is not None for one in parts):
        return None
    return Coding(layer.activations, layer.smooth, layer.rotation)  # pyright: ignore[reportArgumentType]


def _alike(one: Coding, other: Coding) -> bool:
    return one.kind == other.kind and one.rotation == other.rotation and one.smooth is other.smooth


def plain(given: torch.Tensor | Coded) -> torch.Tensor:
    """A module's input that is known not to be rounded."""
    assert isinstance(given, torch.Tensor)
    return given
