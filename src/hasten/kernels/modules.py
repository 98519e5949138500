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
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.prepared import prepare, raw_weight
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
    threshold: float = 0.0
    """Channels in which a magnitude reaches it stay out of the rounding, and have a product of their own (LLM.int8)."""
    compute: torch.dtype | None = None
    """Type that the input is cast to for the product; None computes in the type it comes in."""


@dataclass(frozen=True)
class LowRank:
    """A side branch on the unchanged input: (x @ down.T * scale) @ up.T, in the precision of the input."""

    down: torch.Tensor
    """[ranks, inputs]"""
    up: torch.Tensor
    """[outputs, ranks]"""
    scale: torch.Tensor | None = None
    """[ranks] float32: a factor for each rank, which adapters (LoRA) are weighted with; None is 1."""


def side_branch(
    x: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """(x @ down.T * scale) @ up.T for x [..., inputs], in the type of x."""
    inner = F.linear(x, down.to(x.dtype))
    return F.linear(inner if scale is None else inner * scale.to(x.dtype), up.to(x.dtype))


class Quantized(nn.Module):
    """What quantized layers have in common. Codes and scales keep their types whatever the module is cast to."""

    bias: nn.Parameter | None
    smooth: torch.Tensor | None
    input_scale: torch.Tensor | None
    down: torch.Tensor | None
    up: torch.Tensor | None
    rank_scale: torch.Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        given: Input | None = None,
        low_rank: LowRank | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # Not super(), which may be a plain layer that would make a weight of its own.
        nn.Module.__init__(self)
        given = given or Input()
        self.dtype = dtype or (torch.get_default_dtype() if bias is None else bias.dtype)
        self.shape: tuple[int, ...] = tuple(weight.shape)
        self.number, self.columns = weight.number.name, weight.columns
        self.rotation, self.activations = given.rotation, given.activations
        self.threshold, self.compute = given.threshold, given.compute
        tensors = weight.tensors()
        for name in TENSORS:
            self.register_buffer(name, tensors.get(name))
        self.register_buffer("smooth", given.smooth)
        self.register_buffer("input_scale", given.scale)
        self.register_buffer("down", low_rank.down if low_rank else None)
        self.register_buffer("up", low_rank.up if low_rank else None)
        self.register_buffer("rank_scale", low_rank.scale if low_rank else None)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight in codes."""
        tensors = {name: self._buffers[name] for name in TENSORS if self._buffers[name] is not None}
        return QuantizedWeight.of(self.shape, self.number, self.columns, cast("dict[str, torch.Tensor]", tensors))

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight's values in `dtype`, the type of the module, made anew each time it is asked for.

        As the layer would have it without smoothing, rotation and side branch: these are worked in.
        """
        return self.effective().to(self.dtype)

    def effective(self) -> torch.Tensor:
        """The weight that a plain layer needs to compute the same, float32 in the layer's shape."""
        matrix = self.quantized.dequantize().reshape(self.shape[0], -1)
        matrix = raw_weight(matrix, self.smooth, self.rotation)
        if self.down is not None and self.up is not None:
            up = self.up.float() if self.rank_scale is None else self.up.float() * self.rank_scale
            matrix = matrix + up @ self.down.float()
        return matrix.reshape(self.shape)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output for an input whose last dimension holds the channels."""
        if self.compute not in (None, x.dtype):
            return self.product(x.to(self.compute)).to(x.dtype)
        if self.threshold:
            return self._in_parts(x)
        tensors = [self._buffers[name] for name in TENSORS]
        facts = (self.shape, self.number, self.columns, self.activations)
        # All in one operator, so that a kernel can do the rest on the way.
        return operate(
            x, tensors, self.bias, self.input_scale, *facts,
            smooth=self.smooth, rotation=self.rotation, down=self.down, up=self.up, rank_scale=self.rank_scale,
        )  # fmt: skip

    def _in_parts(self, x: torch.Tensor) -> torch.Tensor:
        """Channels with large magnitudes have a product of their own, which rounds no activations."""
        inner, large = part_channels(prepare(x, self.smooth, self.rotation), self.threshold)
        tensors = [self._buffers[name] for name in TENSORS]
        facts = (self.shape, self.number, self.columns)
        found = operate(inner, tensors, self.bias, self.input_scale, *facts, self.activations)
        found = found + operate(large, tensors, None, None, *facts, "none")
        if self.down is not None and self.up is not None:
            found = found + side_branch(x, self.down, self.up, self.rank_scale)
        return found

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        exact = {name: self._buffers[name] for name in (*TENSORS, "input_scale", "rank_scale")}
        kept = {name: tensor for name, tensor in exact.items() if tensor is not None and tensor.is_floating_point()}
        for name, tensor in kept.items():
            # As integers, which a cast to another floating-point type leaves alone.
            self._buffers[name] = tensor.view(_SAME_SIZE[tensor.element_size()])
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
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
            "threshold": self.threshold,
            "compute": self.compute and str(self.compute).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        """Shape, kind of codes and bits a weight."""
        extra = f", activations={self.activations}" if self.activations != "none" else ""
        return f"{list(self.shape)}, {self.number}, {self.quantized.bits_per_weight:.2f} bits{extra}"


class QuantizedLinear(Quantized, nn.Linear):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A linear layer with its weight, [outputs, inputs], in codes. It is a `Linear`, so that adapters take it."""

    @property
    def in_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Channels of the input."""
        return self.shape[1]

    @property
    def out_features(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Channels of the output."""
        return self.shape[0]

    def forward(self, input: torch.Tensor | Coded) -> torch.Tensor:  # noqa: A002 - the name in nn.Linear
        """[..., inputs] to [..., outputs]; the input may come rounded as this layer rounds it."""
        if not isinstance(input, Coded):
            return self.product(input)
        tensors = [self._buffers[name] for name in TENSORS]
        return coded.operate(input, tensors, self.bias, self.shape, self.number, self.columns)


class QuantizedConv2d(Quantized, nn.Conv2d):  # pyright: ignore[reportIncompatibleVariableOverride]
    """A convolution with its weight in codes. A 1 x 1 kernel is computed as a linear layer; others dequantize."""

    def __init__(
        self,
        weight: QuantizedWeight,
        bias: torch.Tensor | None = None,
        *,
        given: Input | None = None,
        low_rank: LowRank | None = None,
        dtype: torch.dtype | None = None,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] = (0, 0),
    ) -> None:
        Quantized.__init__(self, weight, bias, given=given, low_rank=low_rank, dtype=dtype)
        self.stride, self.padding, self.dilation, self.groups = stride, padding, (1, 1), 1
        self.kernel_size = tuple(self.shape[2:])
        self.in_channels, self.out_channels = self.shape[1], self.shape[0]

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.Conv2d
        """[batch, inputs, height, width] to [batch, outputs, height, width]."""
        if self.kernel_size == (1, 1) and self.stride == (1, 1) and self.padding == (0, 0):
            return self.product(input.movedim(1, -1)).movedim(-1, 1)
        return F.conv2d(input, self.effective().to(input.dtype), self.bias, self.stride, self.padding)


def part_channels(x: torch.Tensor, threshold: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Part [..., channels] in two of the same shape: channels that stay below a magnitude, and those that do not.

    Which channel goes where is decided on the device, for all tokens together; nothing waits for it.
    """
    large = (x.abs() >= threshold).reshape(-1, x.shape[-1]).any(0)
    return torch.where(large, 0, x), torch.where(large, x, 0)


def build(description: dict[str, Any], tensors: dict[str, torch.Tensor]) -> QuantizedLinear:
    """A quantized linear layer from what `describe` and `state_dict` give."""
    shape, number = description["shape"], description["number"]
    weight = QuantizedWeight.of(shape, NUMBERS[number].name, description["columns"], tensors)
    given = Input(
        smooth=tensors.get("smooth"),
        rotation=description["rotation"],
        activations=description["activations"],
        scale=tensors.get("input_scale"),
        threshold=description.get("threshold", 0.0),
        compute=getattr(torch, description["compute"]) if description.get("compute") else None,
    )
    low_rank = LowRank(tensors["down"], tensors["up"], tensors.get("rank_scale")) if "down" in tensors else None
    return QuantizedLinear(weight, tensors.get("bias"), given=given, low_rank=low_rank)
