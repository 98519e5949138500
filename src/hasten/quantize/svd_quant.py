"""SVDQuant: a few bits for most of the weight, and a branch of low rank in 16 bits for what these cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ClassVar, Literal

import torch

from hasten.core.technique import about
from hasten.kernels.activations import Activations
from hasten.kernels.modules import Input, LowRank, Quantized
from hasten.kernels.rounding import quantize_integer
from hasten.quantize.engine.build import quantized_layer
from hasten.quantize.engine.calibrated import CalibratedQuantizer
from hasten.quantize.engine.gptq import Grid, gptq
from hasten.quantize.engine.grids import SCALES, clipped_grid, grid_of, in_codes
from hasten.quantize.engine.low_rank import correction, product_of, whitening
from hasten.quantize.engine.preparation import Preparation, raw_matrix
from hasten.quantize.engine.refinement import Problem, Split, refined, turned
from hasten.quantize.engine.sites import Site
from hasten.quantize.engine.smoothing import (
    activation_noise,
    best_factors,
    exponents,
    factors,
    rounding_noise,
    weight_span,
)
from hasten.quantize.engine.statistics import InputStatistics, quadratic

__all__ = ["SVDQuant"]

_ROUNDED: dict[int, Activations] = {4: "int4", 8: "int8", 16: "none"}
GPTQ_TURNS = 2
"""Turns in which the rest is rounded by GPTQ, at the end."""


@dataclass(frozen=True, kw_only=True)
class SVDQuant(CalibratedQuantizer):
    """Splits weights into a branch of low rank in 16 bits and a rest in few bits, which is rounded more easily.

    The input of the rest is divided by smoothing factors, searched for layers that share an input; the branch takes the
    input as it is. Branch and rest are found in turns: round the rest, then fit the branch to what rounding did to the
    output, until nothing improves. `activations=4` is the paper's own case, computed exactly but not faster where the
    hardware multiplies no 4-bit numbers; 8 loses less and is what Hopper can do. With `FusedQKV` in the recipe
    query, key and value share one projection down.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.05007"
    convolutions: ClassVar[bool] = True

    rank: int = field(default=32, metadata=about("rank of the branch", ge=1, trial=4))
    bits: int = field(default=4, metadata=about("bits of the codes of the rest", ge=2, le=8))
    group: int = field(
        default=64, metadata=about("inputs that share a scale (the greatest common divisor with the layer's)", ge=8)
    )
    symmetric: bool = field(default=True, metadata=about("codes of the rest around zero, without zero points"))
    activations: Literal[4, 8, 16] = field(default=8, metadata=about("bits that inputs of the rest are rounded to"))
    refine: int = field(default=20, metadata=about("turns of rounding and fitting at most", ge=0, le=1000, trial=0))
    smooth: bool = field(default=True, metadata=about("divide inputs of the rest by smoothing factors"))
    grid: int = field(default=20, metadata=about("exponents of smoothing that are tried", ge=1, le=1000, trial=1))
    clip: bool = field(default=True, metadata=about("cut ranges of groups down where that errs less"))
    gptq: bool = field(default=False, metadata=about("round the rest as GPTQ does"))

    def solve(self, together: Sequence[Site], known: InputStatistics) -> list[Quantized]:
        """Find smoothing factors for all, then split each."""
        factor, given = whitening(known.second), Preparation.of(together[0])
        if self.smooth:
            given = self._smoothed(together, known, factor, given)
        return [self._layer(site, known, factor, given) for site in together]

    def _smoothed(
        self, together: Sequence[Site], known: InputStatistics, factor: torch.Tensor, before: Preparation
    ) -> Preparation:
        """The factors that leave the least error, with a branch that does not depend on them."""
        matrices = [raw_matrix(site) for site in together]
        kind = together[0].weight.dtype
        rest = [m - product_of(correction(m, factor, self._rank(m), stored(kind))) for m in matrices]
        span = weight_span(matrices)

        def score(tried: torch.Tensor) -> float:
            given = before.smoothed(tried)
            prepared = given.statistics(known)
            return sum(self._error(given.weight(matrix), prepared) for matrix in rest)

        tried = (factors(known.absmax, span, a, b, kind) for a, b in exponents(self.grid))
        found = best_factors(tried, score)
        return before.smoothed(torch.ones_like(span) if found is None else found)

    def _error(self, rest: torch.Tensor, prepared: InputStatistics) -> float:
        noise = activation_noise(prepared, _ROUNDED[self.activations])
        found = grid_of(rest, self.bits, self.group, self.symmetric).nearest(rest)
        return float(quadratic(rest - found, prepared.second).sum()) + rounding_noise(found, noise)

    def _layer(self, site: Site, known: InputStatistics, factor: torch.Tensor, given: Preparation) -> Quantized:
        prepared, matrix = given.statistics(known), raw_matrix(site)
        problem = Problem(
            matrix=matrix,
            second=known.second,
            factor=factor,
            given=given,
            noise=activation_noise(prepared, _ROUNDED[self.activations]),
            rank=self._rank(matrix),
            kind=stored(site.weight.dtype),
            round=partial(self._round, second=prepared.second),
        )
        split = refined(problem, self.refine)
        if self.gptq:
            # From where nearest rounding has led: a turn of GPTQ takes as long as all those together.
            solver = replace(problem, round=partial(self._round, second=prepared.second, solved=True))
            split = turned(solver, split.branch, GPTQ_TURNS)
        return self._built(site, split, given)

    def _round(self, rest: torch.Tensor, *, second: torch.Tensor, solved: bool = False) -> tuple[Grid, torch.Tensor]:
        if self.clip:
            grid = clipped_grid(rest, second, self.bits, self.group, self.symmetric)
        else:
            grid = grid_of(rest, self.bits, self.group, self.symmetric)
        return grid, gptq(rest, second, grid) if solved else grid.nearest(rest)

    def _built(self, site: Site, split: Split, given: Preparation) -> Quantized:
        weight = in_codes(site.weight.shape, split.rounded, split.grid)
        prepared = given.given(site.weight.dtype, _ROUNDED[self.activations])
        return quantized_layer(site, weight, prepared, split.branch)

    def _rank(self, matrix: torch.Tensor) -> int:
        return min(self.rank, *matrix.shape)

    def outline(self, site: Site) -> Quantized:
        """Codes, scales, factors and branch."""
        weight = quantize_integer(site.weight, self.bits, self.group, symmetric=self.symmetric, scales=SCALES)
        outputs, inputs = site.weight.shape[:2]
        held = site.weight.new_empty(inputs) if self.smooth else None
        kind, rank = stored(site.weight.dtype), min(self.rank, outputs, inputs)
        branch = LowRank(
            site.weight.new_empty(rank, inputs, dtype=kind), site.weight.new_empty(outputs, rank, dtype=kind)
        )
        return quantized_layer(site, weight, Input(smooth=held, activations=_ROUNDED[self.activations]), branch)


def stored(kind: torch.dtype) -> torch.dtype:
    """The type that a branch is stored in: the layer's, or bfloat16 where that has more than 16 bits."""
    return kind if kind.itemsize <= 2 else torch.bfloat16
