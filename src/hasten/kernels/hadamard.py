"""Rotations by Hadamard matrices, which spread a large channel over its group.

Source: ConvRot, https://arxiv.org/abs/2512.03673: Kronecker powers of the regular matrix of order 4, in which no row is
constant, so that the mean of a group is not gathered in one channel.
"""

from __future__ import annotations

import functools

import torch

LARGEST = 256
"""Channels that are rotated together at most."""


def rotation_group(columns: int, largest: int = LARGEST) -> int:
    """The largest power of two up to `largest` that divides the columns; 1 where there is nothing to rotate."""
    return min(columns & -columns, 1 << largest.bit_length() - 1)


@functools.cache
def _matrix(order: int) -> torch.Tensor:
    regular = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], dtype=torch.float64) / 2
    found = torch.ones(1, 1, dtype=torch.float64)
    while found.shape[0] * 4 <= order:
        found = torch.kron(found, regular)
    if found.shape[0] < order:
        found = torch.kron(found, torch.tensor([[1, 1], [1, -1]], dtype=torch.float64) * 0.5**0.5)
    return found


@functools.cache
def hadamard(order: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The symmetric orthogonal matrix of an order that is a power of two: [order, order], its own inverse.

    One for each device and type is kept, so that a call in mid-run copies nothing to the device.
    """
    return _matrix(order).to(device, dtype)


# An operator, so that a compiled graph holds one node and not the making of the matrix.
@torch.library.custom_op("hasten::rotate", mutates_args=())
def _rotate(values: torch.Tensor, group: int) -> torch.Tensor:
    matrix = hadamard(group, device=values.device, dtype=values.dtype)
    return (values.unflatten(-1, (-1, group)) @ matrix).flatten(-2)


@_rotate.register_fake
def _(values: torch.Tensor, group: int) -> torch.Tensor:
    return values.new_empty(values.shape)


def _remember(ctx, inputs, output) -> None:  # noqa: ANN001 # pyright: ignore
    ctx.group = inputs[1]  # pyright: ignore


def _gradient(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None]:  # noqa: ANN001 # pyright: ignore
    return rotate(grad, ctx.group), None  # pyright: ignore


_rotate.register_autograd(_gradient, setup_context=_remember)


def rotate(values: torch.Tensor, group: int) -> torch.Tensor:
    """Rotate the last dimension in groups; doing it twice gives the values back, up to rounding."""
    return _rotate(values, group)  # pyright: ignore
