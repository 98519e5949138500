"""Plain layers with a side branch of low rank beside them, in which adapters (LoRA) are kept."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F

from hasten.kernels.modules import LowRank, QuantizedConv2d, side_branch


class AdaptedLinear(nn.Linear):
    """A linear layer (`base_layer`, which may be of any kind) and a side branch on the same input.

    It is a `Linear` without parameters of its own, so that PEFT can stand around it as well.
    """

    base_layer: Any
    down: torch.Tensor
    up: torch.Tensor
    rank_scale: torch.Tensor

    def __init__(self, base_layer: nn.Module, low_rank: LowRank) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = low_rank.down.shape[1], low_rank.up.shape[0]
        _adapt(self, base_layer, low_rank)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.Linear
        """[..., inputs] to [..., outputs]."""
        return self.base_layer(input) + side_branch(input, self.down, self.up, self.rank_scale)

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the layer, without the side branch."""
        return cast(torch.Tensor, self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the layer."""
        return cast("torch.Tensor | None", self.base_layer.bias)


class AdaptedConv2d(nn.Conv2d):
    """A convolution (`base_layer`) and a side branch: the same convolution to few channels, then a 1 x 1 one."""

    base_layer: Any
    down: torch.Tensor
    """[ranks, inputs * height * width]"""
    up: torch.Tensor
    """[outputs, ranks]"""
    rank_scale: torch.Tensor

    def __init__(self, base_layer: nn.Conv2d | QuantizedConv2d, low_rank: LowRank) -> None:
        nn.Module.__init__(self)
        for name, usual in _CONVOLUTION.items():
            setattr(self, name, getattr(base_layer, name, usual))
        _adapt(self, base_layer, low_rank)

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - the name in nn.Conv2d
        """[batch, inputs, height, width] to [batch, outputs, height, width]."""
        down = self.down.to(input.dtype).unflatten(1, (self.in_channels, *self.kernel_size))
        up = (self.up * self.rank_scale).to(input.dtype)[..., None, None]
        inner = F.conv2d(input, down, None, self.stride, self.padding, self.dilation)
        return self.base_layer(input) + F.conv2d(inner, up)

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the layer, without the side branch."""
        return cast(torch.Tensor, self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the layer."""
        return cast("torch.Tensor | None", self.base_layer.bias)


_CONVOLUTION = {
    "in_channels": 1, "out_channels": 1, "kernel_size": (1, 1), "stride": (1, 1), "padding": (0, 0),
    "dilation": (1, 1), "groups": 1, "padding_mode": "zeros",
}  # fmt: skip
"""What a convolution is described by, with what holds for quantized ones where they do not say."""

Adapted = AdaptedLinear | AdaptedConv2d


def adapted(layer: nn.Module, low_rank: LowRank) -> Adapted:
    """A layer with a side branch beside it."""
    convolves = isinstance(layer, nn.Conv2d | QuantizedConv2d)
    made = AdaptedConv2d(layer, low_rank) if convolves else AdaptedLinear(layer, low_rank)
    return made.train(layer.training)


def _adapt(module: Any, base_layer: nn.Module, low_rank: LowRank) -> None:
    module.base_layer = base_layer
    module.register_buffer("down", low_rank.down)
    module.register_buffer("up", low_rank.up)
    ones = torch.ones(low_rank.down.shape[0], device=low_rank.down.device)
    module.register_buffer("rank_scale", ones if low_rank.scale is None else low_rank.scale)
