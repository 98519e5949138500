"""AWQ: channels that carry much are rounded more finely, by a factor that the input is divided by."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from hasten.core.technique import about
from hasten.kernels.modules import Input, Quantized
from hasten.kernels.rounding import quantize_integer
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.calibrated import CalibratedQuantizer
from hasten.quantize.engine.grids import SCALES, clipped_grid, grid_of, in_codes
from hasten.quantize.engine.preparation import Preparation, raw_matrix
from hasten.quantize.engine.sites import Site
from hasten.quantize.engine.smoothing import best_factors, factors
from hasten.quantize.engine.statistics import InputStatistics, quadratic

__all__ = ["AWQ"]


@dataclass(frozen=True, kw_only=True)
class AWQ(CalibratedQuantizer):
    """Keeps weights in integers of 2 to 8 bits; channels with large inputs get the finer steps.

    Weights are multiplied by a power of the mean magnitude of their inputs, which are divided by the same; the power
    is the one, of `grid` between 0 and 1, whose output errs least. Layers that share an input share it. Then the range
    of each group is cut down where that errs less. All errors are computed from the inputs' second moments.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2306.00978"
    convolutions: ClassVar[bool] = True

    bits: int = field(default=4, metadata=about("bits of a code", ge=2, le=8))
    group: int = field(
        default=64, metadata=about("inputs that share a scale (the greatest common divisor with the layer's)", ge=8)
    )
    symmetric: bool = field(default=False, metadata=about("codes around zero, without zero points"))
    grid: int = field(default=20, metadata=about("powers that are tried", ge=1, le=1000, trial=2))
    clip: bool = field(default=True, metadata=about("cut ranges down where that errs less"))

    def solve(self, together: Sequence[Site], known: InputStatistics) -> list[Quantized]:
        """Find the factors for all, then round each."""
        matrices, before = [raw_matrix(site) for site in together], Preparation.of(together[0])

        def score(tried: torch.Tensor) -> float:
            given = before.smoothed(tried)
            second = given.statistics(known).second
            return sum(self._error(given.weight(matrix), second) for matrix in matrices)

        smooth = best_factors(self._candidates(known, together[0].weight.dtype), score)
        given = before.smoothed(torch.ones_like(known.absmax) if smooth is None else smooth)
        return [self._rounded(site, given, given.statistics(known).second) for site in together]

    def _candidates(self, known: InputStatistics, kind: torch.dtype) -> Iterator[torch.Tensor]:
        for step in range(self.grid + 1):
            yield factors(known.mean_abs, known.mean_abs, step / self.grid, 0.0, kind)

    def _error(self, scaled: torch.Tensor, second: torch.Tensor) -> float:
        found = grid_of(scaled, self.bits, self.group, self.symmetric).nearest(scaled)
        return float(quadratic(scaled - found, second).sum())

    def _rounded(self, site: Site, given: Preparation, second: torch.Tensor) -> Quantized:
        scaled = given.weight(raw_matrix(site))
        if self.clip:
            grid = clipped_grid(scaled, second, self.bits, self.group, self.symmetric)
        else:
            grid = grid_of(scaled, self.bits, self.group, self.symmetric)
        return quantized_layer(site, in_codes(site.weight.shape, scaled, grid), given.given(site.weight.dtype))

    def outline(self, site: Site) -> Quantized:
        """Codes, scales, zero points and factors."""
        weight = quantize_integer(site.weight, self.bits, self.group, symmetric=self.symmetric, scales=SCALES)
        return quantized_layer(site, weight, Input(smooth=site.weight.new_empty(site.weight.shape[1])))
