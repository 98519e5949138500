"""Keeps the weights of linear layers in 4 bits, and multiplies with activations of 8 or 16."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from hasten.core.technique import about
from hasten.kernels.modules import Input, Quantized
from hasten.kernels.rounding import quantize_integer
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.linear_quantizer import LinearQuantizer
from hasten.quantize.engine.sites import Site


@dataclass(frozen=True, kw_only=True)
class Int4Linear(LinearQuantizer):
    """Keeps weights in 4-bit integers with a scale for each group, rounded to nearest (W4A16 or W4A8).

    With 8-bit activations the product runs at the speed of 8 bits, and costs next to nothing in fidelity beyond what
    the weights cost. The plain starting point: `SVDQuant`, `GPTQ` and `AWQ` lose less at the same size.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/1712.05877"
    convolutions: ClassVar[bool] = True
    uniform: ClassVar[bool] = True

    group: int = field(
        default=64, metadata=about("inputs that share a scale (the greatest common divisor with the layer's)", ge=8)
    )
    symmetric: bool = field(default=True, metadata=about("codes around zero, without zero points"))
    activations: Literal["none", "int8"] = field(
        default="none", metadata=about("what activations are rounded to before the product, token by token")
    )

    def quantize(self, site: Site) -> Quantized:
        """Round the weight group by group, with scales of 16 bits."""
        weight = quantize_integer(site.weight, 4, self.group, symmetric=self.symmetric, scales=torch.float16)
        return quantized_layer(site, weight, Input(activations=self.activations))
