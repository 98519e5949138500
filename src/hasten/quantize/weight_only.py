"""Keeps the weights of linear layers in integers of 2 to 8 bits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hasten.core.technique import about
from hasten.kernels.modules import Quantized
from hasten.kernels.rounding import quantize_integer
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.linear_quantizer import LinearQuantizer
from hasten.quantize.engine.sites import Site


@dataclass(frozen=True, kw_only=True)
class WeightOnly(LinearQuantizer):
    """Keeps weights in integers of 2 to 8 bits with a scale (and zero point) for each group; computes as before.

    Saves memory, not time: at the sizes of pictures a step is bound by computation, and each call widens the weights
    first. Rounding is to nearest, without calibration; `GPTQ`, `AWQ` and `SVDQuant` lose less at the same size.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1712.05877"
    convolutions: ClassVar[bool] = True
    uniform: ClassVar[bool] = True

    bits: int = field(default=4, metadata=about("bits of a code", ge=2, le=8))
    group: int = field(
        default=64, metadata=about("inputs that share a scale (the greatest common divisor with the layer's)", ge=8)
    )
    symmetric: bool = field(default=False, metadata=about("codes around zero, without zero points"))

    def quantize(self, site: Site) -> Quantized:
        """Round the weight group by group, with scales of 16 bits."""
        weight = quantize_integer(site.weight, self.bits, self.group, symmetric=self.symmetric, scales=torch.float16)
        return quantized_layer(site, weight)
