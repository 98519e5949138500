"""Layers of the library bitsandbytes, for those who want its kernels."""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch
from torch import nn

from hasten.kernels.prepared import PreparedLinear
from hasten.quantize.engine.sites import Site


def library_layer(
    site: Site, bits: int, quant_type: str, double: bool, compute: torch.dtype | None, threshold: float
) -> nn.Module:
    """A `Linear4bit` or `Linear8bitLt` with the weight of the place; inside what prepares its input, if anything."""
    layers: Any = importlib.import_module("bitsandbytes.nn")
    weight, device = site.weight.to("cpu"), site.weight.device
    outputs, inputs = weight.shape
    sizes = {"input_features": inputs, "output_features": outputs, "bias": False, "device": "meta"}
    if bits == 4:
        kind: dict[str, Any] = {"quant_type": quant_type, "compress_statistics": double}
        made = layers.Linear4bit(**sizes, compute_dtype=compute, **kind)
        made.weight = layers.Params4bit(weight, requires_grad=False, module=made, **kind).to(device)
    else:
        made = layers.Linear8bitLt(**sizes, has_fp16_weights=False, threshold=threshold)
        made.weight = layers.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(device)
    if site.layer.bias is not None:
        # A copy: the library casts it in place to the type of the input.
        made.bias = nn.Parameter(site.layer.bias.detach().clone(), requires_grad=False)
    made = cast(nn.Linear, made.eval())
    if site.wrapper is None:
        return made
    return PreparedLinear(made, smooth=site.wrapper.smooth, rotation=site.wrapper.rotation)
