"""A linear layer on two inputs side by side as a sum of two layers, so that they need not be copied together."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn

from hasten.kernels.coded import Coded


class SegmentedLinear(nn.Linear):
    """Stands in the place of a linear layer whose input is a concatenation, and takes the parts or the whole.

    It has no parameters itself; those are in two layers, of which only the first has a bias. A quantizer takes each by
    itself, with scales of its own, which is right where one part's numbers are far larger than the other's. It is a
    `Linear`, so that adapters can stand around it; `weight` is put together when asked for.
    """

    def __init__(self, layer: nn.Linear, first: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.first = _part(layer, slice(0, first), layer.bias)
        self.second = _part(layer, slice(first, None), None)
        self.border = first
        self.train(layer.training)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: torch.Tensor, second: torch.Tensor | Coded | None = None
    ) -> torch.Tensor:
        """[..., all inputs], or [..., first inputs] and [..., second inputs], to [..., outputs]."""
        if second is None:
            x, second = x[..., : self.border], x[..., self.border :]
        found = self.first(x)
        if isinstance(second, Coded) or not is_plain(self.second) or self.second.weight.dtype != second.dtype:
            return found + self.second(second)
        return _onto(found, second, self.second.weight)

    @property
    def weight(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The whole weight, a copy."""
        return torch.cat([self.first.weight, self.second.weight], 1)

    @property
    def bias(self) -> torch.Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The bias of the first part."""
        return self.first.bias


def is_plain(layer: nn.Module | None) -> bool:
    """Is it a linear layer with a plain weight and nothing of other techniques or libraries around it?"""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__ or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return type(layer.weight.data) is torch.Tensor and layer.weight.is_floating_point()


def _onto(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """found + x @ weight.T in one product."""
    shape = found.shape
    return torch.addmm(found.reshape(-1, shape[-1]), x.reshape(-1, x.shape[-1]), weight.t()).reshape(shape)


def _part(layer: nn.Linear, columns: slice, bias: torch.Tensor | None) -> nn.Linear:
    weight = layer.weight.data[:, columns].clone(memory_format=torch.contiguous_format)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=layer.weight.requires_grad)
    if bias is not None:
        made.bias = nn.Parameter(bias.data, requires_grad=bias.requires_grad)
    return made


class Segments:
    """The memory of a layer that was cut: given up while the parts are in use, and filled from them again."""

    def __init__(self, layer: nn.Linear, cut: SegmentedLinear) -> None:
        self._layer, self._parts = layer, (cut.first, cut.second)
        self._strides: tuple[int, ...] | None = None

    def release(self) -> None:
        """Empty the layer's weight; the object stays."""
        self._strides = self._layer.weight.stride()
        self._layer.weight.data = self._layer.weight.data.new_empty(0)

    def refill(self) -> None:
        """Fill the layer's weight, wherever and in whatever type the parts are now."""
        if self._strides is None:
            return
        whole = torch.cat([part.weight.data for part in self._parts], 1)
        new = torch.empty_strided(whole.shape, self._strides, dtype=whole.dtype, device=whole.device)
        self._layer.weight.data = new.copy_(whole)
        if cast("torch.Tensor | None", self._layer.bias) is not None:
            self._layer.bias.data = self._parts[0].bias.data
