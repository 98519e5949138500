"""Rotations by Hadamard matrices, and layers whose inputs are smoothed and rotated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hasten.kernels.hadamard import hadamard, rotate, rotation_group
from hasten.kernels.prepared import PreparedLinear, prepare, prepare_weight, raw_weight


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 128, 256])
def test_matrices_are_symmetric_and_orthogonal(order: int) -> None:
    matrix = hadamard(order, dtype=torch.float64)
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(order, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(matrix.abs(), torch.full_like(matrix, order**-0.5), atol=1e-12)


def test_no_row_of_a_power_of_four_gathers_the_mean() -> None:
    sums = hadamard(256, dtype=torch.float64).sum(1)
    assert torch.allclose(sums.abs(), torch.ones_like(sums)), "and 16 in one row of the usual matrix"


def test_groups_divide_the_columns() -> None:
    assert [rotation_group(columns) for columns in (1, 3, 48, 640, 3072, 4096)] == [1, 1, 16, 128, 256, 256]
    assert rotation_group(3072, largest=100) == 64


@pytest.mark.parametrize("group", [2, 16, 32])
def test_rotating_twice_gives_the_values_back(group: int) -> None:
    values = torch.randn(3, 5, 64, dtype=torch.float64)
    assert torch.allclose(rotate(rotate(values, group), group), values, atol=1e-12)
    assert not torch.allclose(rotate(values, group), values)


def test_a_large_channel_is_spread() -> None:
    values = torch.randn(16, 256)
    values[:, 7] *= 100
    assert rotate(values, 256).abs().amax() < 0.2 * values.abs().amax()


def test_the_operator_is_sound() -> None:
    torch.library.opcheck(torch.ops.hasten.rotate.default, (torch.randn(3, 8, requires_grad=True), 4))
    meta = rotate(torch.empty(3, 8, device="meta"), 4)
    assert meta.shape == (3, 8)


def plain(dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(48, 24).to(dtype)


@pytest.mark.parametrize("rotation", [1, 16])
@pytest.mark.parametrize("smoothed", [False, True])
def test_a_prepared_layer_computes_the_same(rotation: int, smoothed: bool) -> None:
    layer, x = plain(), torch.randn(2, 5, 48)
    smooth = torch.rand(48) + 0.5 if smoothed else None
    prepared = PreparedLinear.around(layer, smooth=smooth, rotation=rotation)
    assert torch.allclose(prepared(x), layer(x), atol=1e-5)
    assert torch.allclose(prepared.weight, layer.weight, atol=1e-6)
    assert prepared.bias is layer.bias
    assert (rotation == 1 and not smoothed) == torch.allclose(prepared.linear.weight, layer.weight)


def test_smoothing_comes_before_rotation() -> None:
    matrix, smooth, x = torch.randn(6, 16), torch.rand(16) + 0.5, torch.randn(4, 16)
    inner = prepare_weight(matrix, smooth, 8)
    assert torch.allclose(inner, rotate(matrix * smooth, 8), atol=1e-6)
    assert torch.allclose(prepare(x, smooth, 8) @ inner.T, x @ matrix.T, atol=1e-5)
    assert torch.allclose(raw_weight(inner, smooth, 8), matrix, atol=1e-6)


def test_a_prepared_layer_compiles_copies_casts_and_learns() -> None:
    prepared = PreparedLinear.around(plain(), smooth=torch.rand(48) + 0.5, rotation=16)
    x = torch.randn(3, 48, requires_grad=True)
    compiled = torch.compile(prepared, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(x), prepared(x), atol=1e-6)
    assert torch.equal(copy.deepcopy(prepared)(x), prepared(x))
    prepared(x).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, prepared.weight.sum(0).expand(3, -1), atol=1e-4)
    assert prepared.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    assert sorted(prepared.state_dict()) == ["linear.bias", "linear.weight", "smooth"]
