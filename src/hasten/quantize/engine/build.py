"""Makes the quantized module that stands in a layer's place."""

from __future__ import annotations

from typing import cast

from torch import nn

from hasten.kernels.modules import Input, LowRank, Quantized, QuantizedConv2d, QuantizedLinear
from hasten.kernels.weight import QuantizedWeight
from hasten.quantize.engine.sites import Site


def quantized_layer(
    site: Site, weight: QuantizedWeight, given: Input | None = None, low_rank: LowRank | None = None
) -> Quantized:
    """A module with the weight in codes and the layer's own bias, for a linear layer or a convolution."""
    layer, bias = site.layer, site.layer.bias
    if not isinstance(layer, nn.Conv2d):
        return QuantizedLinear(weight, bias, given=given, low_rank=low_rank)
    stride, padding = cast("tuple[int, int]", layer.stride), cast("tuple[int, int]", layer.padding)
    return QuantizedConv2d(weight, bias, given=given, low_rank=low_rank, stride=stride, padding=padding)
