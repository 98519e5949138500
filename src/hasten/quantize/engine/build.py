"""Makes the modules that stand in a layer's place."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import nn

from hasten.core.errors import HastenError
from hasten.kernels.modules import Input, LowRank, Quantized, QuantizedConv2d, QuantizedLinear
from hasten.kernels.prepared import PreparedLinear
from hasten.kernels.weight import QuantizedWeight
from hasten.quantize.engine.sites import Site


def quantized_layer(
    site: Site, weight: QuantizedWeight, given: Input | None = None, low_rank: LowRank | None = None
) -> Quantized:
    """A module with the weight in codes and the layer's own bias, for a linear layer or a convolution.

    Where the layer's input is prepared (smoothed, rotated) by what stands in the place, the module does the same. If
    `given` smooths or rotates itself, that is all that is done, so its weight has to be made from `site.raw_weight`.
    The side branch is always for inputs as they come.
    """
    layer, bias, dtype = site.layer, site.layer.bias, site.weight.dtype
    given = _taken_over(site, given or Input())
    if not isinstance(layer, nn.Conv2d):
        return QuantizedLinear(weight, bias, given=given, low_rank=low_rank, dtype=dtype)
    stride, padding = cast("tuple[int, int]", layer.stride), cast("tuple[int, int]", layer.padding)
    place = {"stride": stride, "padding": padding}
    return QuantizedConv2d(weight, bias, given=given, low_rank=low_rank, dtype=dtype, **place)


def _taken_over(site: Site, given: Input) -> Input:
    if site.wrapper is None or given.smooth is not None or given.rotation > 1:
        return given
    return replace(given, smooth=site.wrapper.smooth, rotation=site.wrapper.rotation)


def prepared_layer(site: Site, *, smooth: torch.Tensor | None = None, rotation: int = 1) -> PreparedLinear:
    """A linear layer for the place that divides its input by `smooth`, [inputs], and rotates it in groups after that.

    What is done to the input already is kept: numbers to smooth by are multiplied, and all smoothing comes before the
    rotation, so `smooth` is for inputs of the place as they come. Raises HastenError for a second rotation.
    """
    before = site.wrapper
    if before is not None:
        if min(before.rotation, rotation) > 1:
            raise HastenError(f"the input of {site.component}.{site.path} is rotated already.")
        smooth = before.smooth if smooth is None else smooth if before.smooth is None else smooth * before.smooth
        rotation = max(before.rotation, rotation)
    layer = cast(nn.Linear, site.layer)
    return PreparedLinear.around(layer, smooth=smooth, rotation=rotation, raw=site.raw_weight)
