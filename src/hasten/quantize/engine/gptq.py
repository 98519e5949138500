"""Rounding one column after the other, with what is left to do in the columns to come: GPTQ.

Source: Frantar et al. 2022, https://arxiv.org/abs/2210.17323. With H the second moments of the inputs and U the upper
Cholesky factor of its inverse, rounding column c by e makes the least error when the columns after it are changed by
-e / U[c, c] * U[c, c+1:].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.core.errors import HastenError
from hasten.kernels.weight import spread

COLUMNS = 128
"""Columns whose changes are gathered before the columns to come are changed."""
TRIES = 40
"""How often damping is raised before giving up."""


@dataclass(frozen=True)
class Grid:
    """What weights may be: scale * (code - zero), codes from `least` to `greatest`."""

    scale: torch.Tensor
    """[outputs, groups]"""
    zero: torch.Tensor | None
    """[outputs, groups], or None for codes around 0."""
    bits: int

    def columns(self, count: int) -> tuple[torch.Tensor, torch.Tensor, int, int]:
        """Scale and zero of each column, [outputs, columns] float32, and the least and the greatest code."""
        scale = spread(self.scale.float(), count).expand(-1, count)
        if self.zero is None:
            greatest = (1 << self.bits - 1) - 1
            return scale, torch.zeros_like(scale), -greatest, greatest
        return scale, spread(self.zero.float(), count).expand(-1, count), 0, (1 << self.bits) - 1

    def nearest(self, matrix: torch.Tensor) -> torch.Tensor:
        """The nearest numbers of the grid, [outputs, inputs] float32."""
        scale, zero, least, greatest = self.columns(matrix.shape[1])
        return ((matrix / scale + zero).round().clamp(least, greatest) - zero) * scale


def gptq(
    matrix: torch.Tensor, second: torch.Tensor, grid: Grid, *, act_order: bool = True, damping: float = 0.01
) -> torch.Tensor:
    """The numbers of a grid that give nearly the same outputs as a weight: [outputs, inputs] float32.

    Args:
        matrix: [outputs, inputs] float32.
        second: [blocks, size, size]: second moments of the inputs; blocks are solved each for itself.
        grid: scales (and zeros) of the groups, fixed beforehand, so that order does not matter for storage.
        act_order: begin with the columns whose inputs are largest.
        damping: what is added to the diagonal, relative to its mean; more where the moments cannot be inverted.
    """
    scale, zero, least, greatest = grid.columns(matrix.shape[1])
    size = second.shape[1]
    parts: list[torch.Tensor] = []
    for number, moments in enumerate(second):
        at = slice(number * size, (number + 1) * size)
        order = _order(moments, act_order)
        solver = _Solver(scale[:, at][:, order], zero[:, at][:, order], least, greatest)
        found = solver.solve(matrix[:, at][:, order].clone(), moments[order][:, order], damping)
        parts.append(found[:, order.argsort()])
    return torch.cat(parts, 1)


def _order(moments: torch.Tensor, act_order: bool) -> torch.Tensor:
    diagonal = moments.diagonal()
    if not act_order:
        return torch.arange(len(diagonal), device=diagonal.device)
    return diagonal.argsort(descending=True, stable=True)


@dataclass(frozen=True)
class _Solver:
    scale: torch.Tensor
    zero: torch.Tensor
    least: int
    greatest: int

    def solve(self, left: torch.Tensor, moments: torch.Tensor, damping: float) -> torch.Tensor:
        factor = inverse_factor(moments, damping).to(left.dtype)
        found = torch.empty_like(left)
        for start in range(0, left.shape[1], COLUMNS):
            end = min(start + COLUMNS, left.shape[1])
            errors = self._columns(left, found, factor, start, end)
            left[:, end:] -= errors @ factor[start:end, end:]
        return found

    def _columns(
        self, left: torch.Tensor, found: torch.Tensor, factor: torch.Tensor, start: int, end: int
    ) -> torch.Tensor:
        errors = left.new_empty(left.shape[0], end - start)
        for column in range(start, end):
            wanted = left[:, column]
            found[:, column] = self._round(wanted, column)
            error = (wanted - found[:, column]) / factor[column, column]
            left[:, column + 1 : end] -= error[:, None] * factor[column, column + 1 : end]
            errors[:, column - start] = error
        return errors

    def _round(self, wanted: torch.Tensor, column: int) -> torch.Tensor:
        scale, zero = self.scale[:, column], self.zero[:, column]
        return ((wanted / scale + zero).round().clamp(self.least, self.greatest) - zero) * scale


def damped(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """Second moments, float64, with something added to the diagonal; inputs that are always 0 count as 1."""
    exact = moments.double()
    diagonal = exact.diagonal()
    exact = exact + torch.diag((diagonal <= 0).double())
    return exact + torch.eye(len(exact), dtype=exact.dtype, device=exact.device) * damping * exact.diagonal().mean()


def cholesky(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """The lower Cholesky factor of damped second moments, float64; damping is raised until there is one."""
    for _ in range(TRIES):
        factor, failed = torch.linalg.cholesky_ex(damped(moments, damping))
        if not failed.item() and factor.isfinite().all():
            return factor
        damping = max(2 * damping, 1e-8)
    raise HastenError("The second moments of a layer's inputs cannot be inverted; they hold undefined numbers.")


def inverse_factor(moments: torch.Tensor, damping: float) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of damped second moments, float64."""
    inverse = torch.cholesky_inverse(cholesky(moments, damping))
    return torch.linalg.cholesky((inverse + inverse.mT) / 2, upper=True)
