"""Layers that train a weight and compute with its rounded value (quantization-aware training)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from hasten.kernels.modules import Quantized
from hasten.kernels.weight import QuantizedWeight
from hasten.quantize.engine.sites import Site


class StraightThrough(nn.Module):
    """A quantized layer whose codes follow a weight in float32, the one that is trained.

    The output is that of the quantized layer, with its rounding of activations and all. The gradient passes
    through the rounding as if it were not there: the straight-through estimator, https://arxiv.org/abs/1308.3432.
    """

    def __init__(self, site: Site, base_layer: Quantized, quantize: Callable[[Site], nn.Module]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.master = nn.Parameter(site.weight.float().clone())
        layer = nn.Linear(1, 1, bias=False) if not site.is_conv else nn.Conv2d(1, 1, 1, bias=False)
        self._place = (replace(site, layer=layer),)  # in a tuple, so that it is no sub-module
        self._quantize = quantize
        self._rounded = base_layer.effective()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the quantized layer gives."""
        if self.base_layer.activations == "none":
            # The difference is 0: it brings the weight's gradient with it.
            weight = self._rounded + (self.master - self.master.detach())
            return self._product(x, weight, self.base_layer.bias)
        plain = self._product(x.detach(), self.master)
        # The difference is 0: it brings the gradient of a plain product with it, and no value.
        return self.base_layer(x) + (plain - plain.detach())

    @torch.no_grad()
    def round(self) -> QuantizedWeight:
        """Make the codes anew from the weight as it is now; returns them."""
        place = self._place[0]
        place.layer.weight = nn.Parameter(self.master.detach(), requires_grad=False)
        made = cast(Quantized, self._quantize(place))
        for name, tensor in made._buffers.items():
            self.base_layer._buffers[name] = tensor
        self._rounded = self.base_layer.effective()
        return made.quantized

    @property
    def weight(self) -> torch.Tensor:
        """The weight that is computed with."""
        return self.base_layer.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """That of the layer."""
        return cast("torch.Tensor | None", self.base_layer.bias)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
        return F.linear(x, weight, bias) if weight.dim() == 2 else F.conv2d(x, weight, bias)
