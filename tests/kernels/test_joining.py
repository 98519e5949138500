"""Joins and cuts of quantized weights: the values are those of the parts, bit for bit; codes are not touched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hasten.kernels.joining import CannotJoin, join_inputs, join_outputs, reshaped, split_inputs
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.rounding import quantize_float8, quantize_integer
from hasten.kernels.weight import QuantizedWeight, Scales


def drawn(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def affine(rows: int, columns: int, seed: int = 0, bits: int = 5) -> QuantizedWeight:
    return quantize_integer(drawn(rows, columns, seed), bits, 16, symmetric=False)


def nested(rows: int, columns: int, seed: int = 0) -> QuantizedWeight:
    """Scales and minimums as codes, as in K-quants."""
    base = affine(rows, columns, seed, 4)
    codes = torch.randint(1, 64, (rows, columns // 16), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    coarse = torch.rand(rows, columns // 32).half()
    return replace(base, zero=None, scale=Scales(codes, coarse), minimum=Scales(codes.flip(1), coarse * 2))


@pytest.mark.parametrize("make", [affine, nested])
def test_joined_outputs_have_the_values_of_the_parts(make: type) -> None:
    parts = [make(8, 64, 0), make(16, 64, 1), make(8, 64, 2)]
    joined = join_outputs(parts)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts]))
    assert torch.equal(joined.codes, torch.cat([part.codes for part in parts]))
    for part, again in zip(parts, joined.split([8, 16, 8]), strict=True):
        assert part.shape == again.shape
        assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in part.tensors().items())


def test_scales_of_whole_tensors_become_scales_of_rows_where_they_differ() -> None:
    one, other = (quantize_float8(drawn(4, 8, seed), block="tensor") for seed in (0, 1))
    joined = join_outputs([one, other])
    assert joined.scale.codes.shape == (8, 1)
    assert torch.equal(joined.dequantize(), torch.cat([one.dequantize(), other.dequantize()]))
    assert join_outputs([one, one]).scale.codes.shape == (1, 1)


@pytest.mark.parametrize("make", [affine, nested])
def test_joined_inputs_have_the_values_of_the_parts(make: type) -> None:
    parts = [make(8, 64, 0), make(8, 32, 1)]
    joined = join_inputs(parts)
    assert joined.shape == (8, 96)
    assert torch.equal(joined.dequantize(), torch.cat([part.dequantize() for part in parts], 1))
    for part, again in zip(parts, split_inputs(joined, [64, 32]), strict=True):
        assert torch.equal(part.dequantize(), again.dequantize())
        assert torch.equal(part.codes, again.codes)


def test_scales_of_rows_become_groups_beside_each_other() -> None:
    one, other = quantize_integer(drawn(4, 16), 8), quantize_integer(drawn(4, 64, 1), 8)
    joined = join_inputs([one, other])
    assert joined.scale.codes.shape == (4, 5)
    assert torch.equal(joined.dequantize(), torch.cat([one.dequantize(), other.dequantize()], 1))


def test_a_grid_that_runs_over_rows_is_cut_where_its_rows_end() -> None:
    base = quantize_integer(drawn(6, 64), 8, 32)
    weight = replace(base, shape=(12, 32))
    assert [part.codes.shape[0] for part in weight.split([4, 8])] == [2, 4]
    with pytest.raises(ValueError, match="cross the borders"):
        weight.split([3, 9])


def test_what_has_no_common_form() -> None:
    weight = affine(8, 64)
    with pytest.raises(CannotJoin, match="different inputs"):
        join_outputs([weight, affine(8, 32)])
    with pytest.raises(CannotJoin, match="kinds of codes"):
        join_outputs([weight, affine(8, 64, bits=4)])
    with pytest.raises(CannotJoin, match="with and without minimums"):
        join_outputs([nested(8, 64), replace(nested(8, 64), minimum=None)])
    with pytest.raises(CannotJoin, match="different outputs"):
        join_inputs([weight, affine(16, 64)])
    offset = [replace(weight, scale=replace(weight.scale, offset=torch.tensor(float(k)))) for k in range(2)]
    with pytest.raises(CannotJoin, match="offsets"):
        join_outputs(offset)
    table = [replace(weight, number=NUMBERS["table5"], zero=None, table=torch.rand(32)) for _ in range(2)]
    with pytest.raises(CannotJoin, match="tables"):
        join_outputs(table)


def test_groups_that_cross_a_cut() -> None:
    with pytest.raises(CannotJoin, match="Groups of 16 inputs cross"):
        split_inputs(affine(8, 64), [24, 40])
    with pytest.raises(CannotJoin, match="cannot be cut"):
        split_inputs(affine(8, 64), [16, 16])


def test_a_convolution_of_one_pixel_is_a_linear_layer() -> None:
    weight = affine(8, 64)
    assert reshaped(weight, (8, 64, 1, 1)).dequantize().shape == (8, 64, 1, 1)
    with pytest.raises(CannotJoin, match="no weight of shape"):
        reshaped(weight, (8, 32))
