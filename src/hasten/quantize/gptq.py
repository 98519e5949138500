"""GPTQ: weights rounded column after column, each correcting what the ones before did to the output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from hasten.core.technique import about
from hasten.kernels.modules import Quantized
from hasten.kernels.rounding import as_matrix, quantize_integer
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.calibrated import CalibratedQuantizer
from hasten.quantize.engine.gptq import gptq
from hasten.quantize.engine.grids import SCALES, grid_of, in_codes
from hasten.quantize.engine.preparation import Preparation
from hasten.quantize.engine.sites import Site
from hasten.quantize.engine.statistics import InputStatistics

__all__ = ["GPTQ"]


@dataclass(frozen=True, kw_only=True)
class GPTQ(CalibratedQuantizer):
    """Keeps weights in integers of 2 to 8 bits, rounded so that the outputs change least.

    Columns are rounded one after the other; what rounding one does to the output is undone as far as possible by
    changing the columns to come, as the second moments of the inputs say. Stored and computed like `WeightOnly`, with
    a smaller error at the same size. Groups have their scales before the columns are put in order, so that they are
    stored as they lie.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2210.17323"
    convolutions: ClassVar[bool] = True

    bits: int = field(default=4, metadata=about("bits of a code", ge=2, le=8))
    group: int = field(
        default=64, metadata=about("inputs that share a scale (the greatest common divisor with the layer's)", ge=8)
    )
    symmetric: bool = field(default=False, metadata=about("codes around zero, without zero points"))
    act_order: bool = field(default=True, metadata=about("begin with the columns whose inputs are largest"))
    damping: float = field(
        default=0.01, metadata=about("added to the second moments, relative to their mean", gt=0.0, le=1.0)
    )

    def solve(self, together: Sequence[Site], known: InputStatistics) -> list[Quantized]:
        """Each layer for itself."""
        return [self._solved(site, known) for site in together]

    def _solved(self, site: Site, known: InputStatistics) -> Quantized:
        matrix = as_matrix(site.weight)
        second = Preparation.of(site).statistics(known).second
        grid = grid_of(matrix, self.bits, self.group, self.symmetric)
        found = gptq(matrix, second, grid, act_order=self.act_order, damping=self.damping)
        return quantized_layer(site, in_codes(site.weight.shape, found, grid))

    def outline(self, site: Site) -> Quantized:
        """Codes, scales and zero points."""
        weight = quantize_integer(site.weight, self.bits, self.group, symmetric=self.symmetric, scales=SCALES)
        return quantized_layer(site, weight)
