"""From a weight to codes: rounding to integers, to 8-bit floats and to the entries of a table, group by group."""

from __future__ import annotations

import math

import torch

from hasten.core.errors import HastenError
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.packing import pack
from hasten.kernels.weight import QuantizedWeight, Scales, spread

FLOAT8 = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}
"""The 8-bit floating-point types and their greatest numbers."""


def fitting_group(columns: int, group: int | None) -> int:
    """The size of groups that divides the columns: `group` or the greatest common divisor; all columns for None."""
    return columns if group is None else math.gcd(columns, group)


def as_matrix(weight: torch.Tensor) -> torch.Tensor:
    """A weight as [outputs, all others], float32; raises HastenError for one with NaN or infinite numbers."""
    matrix = weight.detach().reshape(weight.shape[0], -1).float()
    check_finite(matrix, "the weight holds numbers that are NaN or infinite")
    return matrix


def check_finite(values: torch.Tensor, otherwise: str) -> None:
    """Raise HastenError unless all numbers are finite; those without storage (on the meta device) pass."""
    if values.device.type != "meta" and not (good := values.isfinite()).all():
        raise HastenError(f"{otherwise} ({values.numel() - int(good.sum())} of {values.numel()} places).")


def grouped(values: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, columns] as [rows, groups, group]."""
    return values.reshape(values.shape[0], values.shape[1] // group, group)


def quantize_integer(
    weight: torch.Tensor,
    bits: int,
    group: int | None = None,
    *,
    symmetric: bool = True,
    scales: torch.dtype = torch.float32,
) -> QuantizedWeight:
    """Round to integers: w = scale * code (symmetric) or scale * (code - zero), nearest rounding.

    Args:
        weight: [outputs, inputs] or a convolution's weight, which is taken as [outputs, all others].
        bits: 2 to 8.
        group: numbers along the inputs that share a scale; None shares it over the row.
        symmetric: codes from -(2**(bits-1) - 1) to 2**(bits-1) - 1 and no zero point; else the range of the numbers
            (0 included) is divided into 2**bits - 1 steps.
        scales: type in which scales are stored; weights are rounded with the stored ones.
    """
    matrix = as_matrix(weight)
    parts = grouped(matrix, fitting_group(matrix.shape[1], group))
    scale, zero = symmetric_grid(parts, bits) if symmetric else affine_grid(parts, bits)
    check_finite(scale := scale.to(scales), f"scales of type {scales} overflow")
    return with_scales(weight.shape, matrix, bits, positive(scale), zero)


def symmetric_grid(parts: torch.Tensor, bits: int) -> tuple[torch.Tensor, None]:
    """The scale of each group that makes its largest number the greatest code: [rows, groups]."""
    return positive(parts.abs().amax(-1) / ((1 << bits - 1) - 1)), None


def affine_grid(parts: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of each group, [rows, groups]: its range, and 0, divided into steps."""
    low, high = parts.amin(-1).clamp(max=0), parts.amax(-1).clamp(min=0)
    scale = positive((high - low) / ((1 << bits) - 1))
    return scale, (-low / scale).round()


def with_scales(
    shape: torch.Size | tuple[int, ...],
    matrix: torch.Tensor,
    bits: int,
    scale: torch.Tensor,
    zero: torch.Tensor | None,
) -> QuantizedWeight:
    """Round a matrix, [rows, columns] float32, to integers of given scales (and zero points), [rows or 1, groups]."""
    number = NUMBERS[f"int{bits}" if zero is None else f"uint{bits}"]
    codes = (matrix / spread(scale.float(), matrix.shape[1])).round()
    if zero is not None:
        codes = codes + spread(zero, matrix.shape[1])
    # The most negative code is left out, so that the grid is symmetric.
    codes = codes.clamp(number.least + (zero is None), number.greatest)
    stored = codes.to(torch.int8) if number.dtype == torch.int8 else (codes + number.shift).to(torch.uint8)
    kept = None if zero is None else zero.to(torch.uint8)
    packed = pack(stored, bits) if number.packed else stored
    return QuantizedWeight(tuple(shape), number, matrix.shape[1], packed, Scales(scale), zero=kept)


def quantize_float8(weight: torch.Tensor, number: str = "float8_e4m3fn", *, block: str = "row") -> QuantizedWeight:
    """Round to 8-bit floats that share a scale over the `tensor`, a `row`, or a `block` of 128 x 128."""
    matrix = as_matrix(weight)
    scale = positive(float8_range(matrix, block) / FLOAT8[number])
    codes = (matrix / spread(scale, matrix.shape[1])).to(NUMBERS[number].dtype)
    return QuantizedWeight(tuple(weight.shape), NUMBERS[number], matrix.shape[1], codes, Scales(scale))


def float8_range(matrix: torch.Tensor, block: str) -> torch.Tensor:
    """The greatest magnitude of what shares a scale: [1, 1], [rows, 1] or [rows, columns / 128]."""
    if block == "tensor":
        return matrix.abs().amax().reshape(1, 1)
    if block == "row":
        return matrix.abs().amax(1, keepdim=True)
    side = fitting_group(matrix.shape[0], 128)
    tiles = grouped(matrix.abs(), fitting_group(matrix.shape[1], 128)).amax(-1)
    return tiles.reshape(-1, side, tiles.shape[1]).amax(1).repeat_interleave(side, 0)


def quantize_table(weight: torch.Tensor, table: torch.Tensor, bits: int, group: int) -> QuantizedWeight:
    """Round to the nearest entry of a table of 2**bits numbers up to 1, times the greatest magnitude of the group."""
    matrix = as_matrix(weight)
    scale = positive(grouped(matrix, fitting_group(matrix.shape[1], group)).abs().amax(-1))
    codes = nearest_entry(matrix / spread(scale, matrix.shape[1]), table.to(matrix.device))
    number = NUMBERS[f"table{bits}"]
    return QuantizedWeight(
        tuple(weight.shape), number, matrix.shape[1], pack(codes, bits) if number.packed else codes, Scales(scale),
        # A copy, so that no two layers share it: files of weights refuse that.
        table=table.to(matrix.device, torch.float32, copy=True),
    )  # fmt: skip


def nearest_entry(values: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the entry nearest to each value, uint8; a tie goes to the lower entry."""
    ordered, order = table.float().sort()
    places = torch.bucketize(values, (ordered[1:] + ordered[:-1]) / 2)
    return order[places].to(torch.uint8)


def positive(scale: torch.Tensor) -> torch.Tensor:
    """Scales with 1 in place of 0, for groups that hold nothing but zeros."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))
