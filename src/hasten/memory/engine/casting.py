"""Layers that keep their weight in 8 bits and cast it to their input's type in each call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd  # pyright: ignore[reportPrivateUsage]

from hasten.core.away import taken_away
from hasten.core.intercept import base_class
from hasten.memory.engine.weights import Weight

CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


class CastWeight:
    """The weight of one layer, stored in 8 bits."""

    def __init__(self, layer: nn.Module, storage: torch.dtype) -> None:
        self.layer, self.parameter = layer, cast(nn.Parameter, layer.weight)
        self.storage, self.compute = storage, self.parameter.dtype
        self.bytes_before = _nbytes(self.parameter.data)
        self.bytes_stored = 0
        """Size of the memory that the stored weight takes."""

    @property
    def is_cast(self) -> bool:
        """Is the weight still what was stored?"""
        return self.layer.weight is self.parameter and self.parameter.dtype == self.storage

    def rounded(self) -> torch.Tensor:
        """The weight in 8 bits, in the same layout; numbers beyond the type's range become its largest."""
        limit = torch.finfo(self.storage).max
        found = self.parameter.data.clamp(-limit, limit).to(self.storage)
        self.bytes_stored = _nbytes(found)
        return found

    def keep_original(self) -> Callable[[], None]:
        """Bring the original to host memory, so that it takes none on the device; returns what gives it back."""
        original = Weight(self.parameter)
        if self.parameter.device.type != "cpu":
            original.settle(self.parameter.data.to("cpu"))
        return original.restore

    def widen(self) -> None:
        """Where the original was dropped: give what is left of it the original type."""
        if self.parameter.dtype == self.storage:
            self.parameter.data = self.parameter.data.to(self.compute)


def castable_layers(network: nn.Module, skip: Iterable[str]) -> Iterator[tuple[str, nn.Module]]:
    """The linears and convolutions of a network's blocks that match no pattern, with their paths.

    Embeddings and the first and last projections stand outside the blocks. Left out as well are layers whose weight
    another technique has taken over, those that the model wants in float32, adapters (LoRA), and the layer that holds
    the network's first weight, of which pipelines read the type they compute in.
    """
    away = {id(tensor) for tensor in taken_away(network)}
    away |= {id(parameter) for parameter in list(network.parameters())[:1]}
    kept = tuple(getattr(network, "_keep_in_fp32_modules", None) or ())
    patterns = ("*lora_*", *skip)
    for path, layer in network.named_modules():
        segments = path.split(".")
        if not _is_plain(layer) or id(layer.weight) in away or not any(map(str.isdigit, segments)):
            continue
        if not any(fnmatchcase(path, pattern) for pattern in patterns) and not set(kept).intersection(segments):
            yield path, layer


def _is_plain(layer: nn.Module) -> bool:
    kind = base_class(layer)
    return kind in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and isinstance(layer.weight, nn.Parameter)


def casting(layer: nn.Module) -> Callable[..., torch.Tensor]:
    """A link around the layer's `forward` that computes with the weight cast to the input's type."""
    if isinstance(layer, nn.Linear):

        def linear(call: Callable[..., Any], input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - PyTorch's name
            return functional.linear(input, layer.weight.to(input.dtype), layer.bias)

        return linear
    convolution = cast(_ConvNd, layer)

    def convolve(call: Callable[..., Any], input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - PyTorch's name
        weight = convolution.weight.to(input.dtype)
        return cast(Any, convolution)._conv_forward(input, weight, convolution.bias)

    return convolve


def _nbytes(data: torch.Tensor) -> int:
    return data.untyped_storage().nbytes()
