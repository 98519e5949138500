"""Computes linear layers with 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch

from hasten.core.technique import about
from hasten.kernels.activations import Activations
from hasten.kernels.modules import Input, Quantized
from hasten.kernels.rounding import quantize_float8
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.linear_quantizer import LinearQuantizer
from hasten.quantize.engine.sites import Site


@dataclass(frozen=True, kw_only=True)
class Float8Linear(LinearQuantizer):
    """Keeps weights in 8-bit floats, and multiplies such floats on GPUs that can (compute capability 8.9 and later).

    Activations are rounded while the model runs, token by token. A large number disturbs only those that share its
    scale, and far less than it does among integers; otherwise errors are three times those of `Int8Linear`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2209.05433"
    convolutions: ClassVar[bool] = True
    uniform: ClassVar[bool] = True

    granularity: Literal["row", "tensor", "block"] = field(
        default="row",
        metadata=about(
            "weights that share a scale: those of an output, all, or 128 x 128 (activations then by 128 channels)"
        ),
    )
    activations: Literal["float8", "none"] = field(
        default="float8", metadata=about("what activations are rounded to before the product")
    )
    input_scale: float | None = field(
        default=None,
        metadata=about("one fixed scale for all activations (448 times it is the largest); None: one a token", gt=0),
    )
    number: Literal["e4m3", "e5m2"] = field(
        default="e4m3", metadata=about("exponent and mantissa bits of the weights; activations are always e4m3")
    )

    def quantize(self, site: Site) -> Quantized:
        """Round the weight with the scales asked for."""
        number = "float8_e4m3fn" if self.number == "e4m3" else "float8_e5m2"
        weight = quantize_float8(site.weight, number, block=self.granularity)
        return quantized_layer(site, weight, self._input(site))

    def _input(self, site: Site) -> Input:
        if self.activations == "none":
            return Input()
        if self.input_scale is not None:
            fixed = torch.tensor(self.input_scale, dtype=torch.float32, device=site.weight.device)
            return Input(activations="float8", scale=fixed)
        kind: Activations = "float8_block" if self.granularity == "block" else "float8"
        return Input(activations=kind)
