"""Layers whose weight is kept in codes: plain modules with plain buffers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from hasten.kernels import coded
from hasten.kernels.activations import Activations
from hasten.kernels.coded import Coded
from hasten.kernels.hadamard import rotate
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.product import operate
from hasten.kernels.weight import TENSORS, QuantizedWeight

_SAME_SIZE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Input:
    """What is done to the input of a product; the weight was made for inputs that went through it."""

    smooth: torch.Tensor | None = None
    """[inputs]: the input is divided by it first."""
    rotation: int = 1
    """Channels that a Hadamard matrix rotates together, after smoothing; 1 for none."""
    activations: Activations = "none"
    """What the result is rounded to."""
    scale: torch.Tensor | None = None
    """[] the fixed scale of 8-bit activations; None computes one for each token."""


@dataclass(frozen=True)
class LowRank:
    """A side branch on the unchanged input: x @ down.T * scale @ up.T, in the precision of the input."""

    down: torch.Tensor
    """[ranks, inputs]"""
    up: torch.Tensor
    """[outputs, ranks]"""


class Quantized(nn.Module):
    """What quantized layers have in common. Codes and scales keep their types whatever the module is cast to."""

    bias: nn.Parameter | None
    smooth: torch.Tensor | None
    input_scale: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        given: Input | None = None,
        low_rank: LowRank | None = None,
    ) -> None:
        super().__init__()
        given = given or Input()
        self.shape: tuple[int, ...] = tuple(weight.shape)
        self.number, self.columns = weight.number.name, weight.columns
        self.rotation, self.activations = given.rotation, given.activations
        tensors = weight.tensors()
        for name in TENSORS:
            self.register_buffer(name, tensors.get(name))
        self.register_buffer("smooth", given.smooth)
        self.register_buffer("input_scale", given.scale)
        self.register_buffer("down", low_rank.down if low_rank else None)
        self.register_buffer("up", low_rank.up if low_rank else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight in codes."""
        tensors = {name: self._buffers[name] for name in TENSORS if self._buffers[name] is not None}
        return QuantizedWeight.of(self.shape, self.number, self.columns, cast("dict[str, torch.Tensor]", tensors))

    @property
    def weight(self) -> torch.Tensor:
        """The weight's values in the type of the module, made anew each time it is asked for.

        As the layer would have it without smoothing, rotation and side branch: these are worked in.
        """
        dtype = self.bias.dtype if self.bias is not None else torch.get_default_dtype()
        return self.effective().to(dtype)

    def effective(self) -> torch.Tensor:
        """The weight that a plain layer needs to compute the same, float32 in the layer's shape."""
        matrix = self.quantized.dequantize().reshape(self.shape[0], -1)
        matrix = matrix if self.rotation == 1 else rotate(matrix, self.rotation)
        matrix = matrix if self.smooth is None else matrix / self.smooth.float()
        if self.down is not None and self.up is not None:
            matrix = matrix + self.up.float() @ self.down.float()
        return matrix.reshape(self.shape)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for an input whose last dimension holds the channels."""
        inner = x if self.smooth is None else x / self.smooth.to(x.dtype)
        inner = inner if self.rotation == 1 else rotate(inner, self.rotation)
        tensors = [self._buffers[name] for name in TENSORS]
        facts = (self.shape, self.number, self.columns, self.activations)
        found = operate(inner, tensors, self.bias, self.input_scale, *facts)
        if self.down is not None and self.up is not None:
            found = found + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return found

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        exact = {name: self._buffers[name] for name in (*TENSORS, "input_scale")}
        kept = {name: tensor for name, tensor in exact.items() if tensor is not None and tensor.is_floating_point()}
        for name, tensor in kept.items():
            # As integers, which a cast to another floating-point type leaves alone.
            self._buffers[name] = tensor.view(_SAME_SIZE[tensor.element_size()])
        try:
            return super()._apply(fn, recurse)
        finally:
            for name, tensor in kept.items():
                self._buffers[name] = cast(torch.Tensor, self._buffers[name]).view(tensor.dtype)

    def describe(self) -> dict[str, Any]:
        """What beside the tensors is needed to build the module again."""
        return {
            "shape": list(self.shape),
            "number": self.number,
            "columns": self.columns,
            "rotation": self.rotation,
            "activations": self.activations,
        }

    def extra_repr(self) -> str:
        """Shape, kind of codes and bits a weight."""
        extra = f", activations={self.activations}" if self.activations != "none" else ""
        return f"{list(self.shape)}, {self.number}, {self.quantized.bits_per_weight:.2f} bits{extra}"


class QuantizedLinear(Quantized):
    """A linear layer with its weight, [outputs, inputs], in codes."""

    @property
    def in_features(self) -> int:
        """Channels of the input."""
        return self.shape[1]

    @property
    def out_features(self) -> int:
        """Channels of the output."""
        return self.shape[0]

    def forward(self, x: torch.Tensor | Coded) -> torch.Tensor:
        """[..., inputs] to [..., outputs]; the input may come rounded as this layer rounds it."""
        if not isinstance(x, Coded):
            return self.product(x)
        tensors = [self._buffers[name] for name in TENSORS]
        return coded.operate(x, tensors, self.bias, self.shape, self.number, self.columns)


class QuantizedConv2d(Quantized):
    """A convolution with its weight in codes. A 1 x 1 kernel is computed as a linear layer; others dequantize."""

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        given: Input | None = None,
        low_rank: LowRank | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(weight, bias, given=given, low_rank=low_rank)
        self.stride, self.padding = stride, padding
        self.kernel_size = tuple(self.shape[2:])
        self.in_channels, self.out_channels = self.shape[1], self.shape[0]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, inputs, height, width] to [batch, outputs, height, width]."""
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            return self.product(x.movedim(1, -1)).movedim(-1, 1)
        return F.conv2d(x, self.effective().to(x.dtype), self.bias, self.stride, self.padding)


def build(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> QuantizedLinear:
    """A quantized linear layer from what `describe` and `state_dict` give."""
    shape, number = description["shape"], description["number"]
    weight = QuantizedWeight.of(shape, NUMBERS[number].name, description["columns"], tensors)
    given = Input(
        smooth=tensors.get("smooth"),
        rotation=description["rotation"],
        activations=description["activations"],
        scale=tensors.get("input_scale"),
    )
    low_rank = LowRank(tensors["down"], tensors["up"]) if "down" in tensors else None
    return QuantizedLinear(weight, tensors.get("bias"), given=given, low_rank=low_rank)
