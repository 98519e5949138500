"""Computes linear layers with 8-bit integers: weights by row, activations by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from hasten.core.technique import about
from hasten.kernels.modules import Input, Quantized
from hasten.kernels.rounding import quantize_integer
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.linear_quantizer import LinearQuantizer
from hasten.quantize.engine.sites import Site


@dataclass(frozen=True, kw_only=True)
class Int8Linear(LinearQuantizer):
    """Keeps weights in 8-bit integers with a scale for each output, and multiplies integers (W8A8).

    Activations are rounded token by token while the model runs, with scales computed in float32; nothing needs to be
    calibrated. With `activations="none"` only memory is saved. Errors are a third of those of 8-bit floats unless some
    channels are far larger than the others; `HadamardRotation` in the same recipe spreads those.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2211.10438"
    convolutions: ClassVar[bool] = True
    uniform: ClassVar[bool] = True

    activations: Literal["int8", "none"] = field(
        default="int8", metadata=about("what activations are rounded to before the product")
    )

    def quantize(self, site: Site) -> Quantized:
        """Round the weight row by row."""
        weight = quantize_integer(site.weight, 8)
        return quantized_layer(site, weight, Input(activations=self.activations))
