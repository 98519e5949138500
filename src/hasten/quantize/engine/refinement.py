"""A weight as a matrix of low rank in 16 bits and a rest in few bits: found in turns until neither improves.

Sources: SVDQuant, https://arxiv.org/abs/2411.05007; what is kept here of the inputs are their second moments, so that
errors are those of the output and no picture is made on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from hasten.kernels.modules import LowRank
from hasten.quantize.engine.gptq import Grid
from hasten.quantize.engine.low_rank import correction, leading, product_of
from hasten.quantize.engine.preparation import Preparation
from hasten.quantize.engine.smoothing import rounding_noise
from hasten.quantize.engine.statistics import quadratic

GAIN = 1e-3
"""Relative gain of a round below which the turns end."""

Rounding = Callable[[torch.Tensor], tuple[Grid, torch.Tensor]]
"""From a weight for prepared inputs, [outputs, inputs], to a grid and the numbers on it."""


@dataclass(frozen=True)
class Problem:
    """A weight, what is known of its inputs, and how the two parts are stored."""

    matrix: torch.Tensor
    """[outputs, inputs] float32."""
    second: torch.Tensor
    """Second moments of the raw inputs."""
    factor: torch.Tensor
    """Their Cholesky factors, see `low_rank.whitening`."""
    given: Preparation
    """What is done to inputs of the rest."""
    noise: torch.Tensor
    """[inputs] what rounding adds to the prepared inputs of the rest."""
    rank: int
    kind: torch.dtype
    """Type that the matrix of low rank is stored in."""
    round: Rounding

    def starts(self) -> Iterator[LowRank]:
        """First guesses: what is nearest to the output, and, as the paper has it, nearest to the weight of the rest."""
        yield correction(self.matrix, self.factor, self.rank, self.kind)
        left, values, right = leading(self.given.weight(self.matrix), self.rank)
        down = self.given.raw((right * values.sqrt()).mT)
        yield LowRank(down=down.to(self.kind).contiguous(), up=(left * values.sqrt()).to(self.kind).contiguous())

    def split(self, branch: LowRank) -> Split:
        """Round what a branch leaves."""
        grid, rounded = self.round(self.given.weight(self.matrix - product_of(branch)))
        return self.scored(branch, grid, rounded)

    def improved(self, found: Split) -> Split:
        """The branch anew, for the same rounded rest."""
        branch = correction(self.matrix - self.given.raw(found.rounded), self.factor, self.rank, self.kind)
        return self.scored(branch, found.grid, found.rounded)

    def scored(self, branch: LowRank, grid: Grid, rounded: torch.Tensor) -> Split:
        """Both parts with the error of the output that they make together."""
        change = self.matrix - product_of(branch) - self.given.raw(rounded)
        error = float(quadratic(change, self.second).sum()) + rounding_noise(rounded, self.noise)
        return Split(branch, grid, rounded, error)


@dataclass(frozen=True)
class Split:
    """A matrix of low rank, a rounded rest, and the error that remains."""

    branch: LowRank
    grid: Grid
    rounded: torch.Tensor
    error: float


def refined(problem: Problem, rounds: int) -> Split:
    """The best of all splits that up to `rounds` turns from each first guess give."""
    return min((turned(problem, start, rounds) for start in problem.starts()), key=lambda split: split.error)


def turned(problem: Problem, branch: LowRank, rounds: int) -> Split:
    """The best split of up to `rounds` turns: fit the branch to what rounding did, and round what it leaves."""
    best = problem.split(branch)
    for _ in range(rounds):
        fitted = problem.improved(best)
        again = problem.split(fitted.branch)
        found = min(fitted, again, key=lambda split: split.error)
        if found.error > best.error * (1 - GAIN):
            return min(found, best, key=lambda split: split.error)
        best = found
    return best
