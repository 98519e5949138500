"""From weights to codes."""

from __future__ import annotations

import pytest
import torch

from hasten.core.errors import HastenError
from hasten.kernels.rounding import (
    FLOAT8,
    nearest_entry,
    quantize_float8,
    quantize_integer,
    quantize_table,
)
from hasten.kernels.weight import QuantizedWeight

TABLE = torch.tensor([-1.0, -0.5, -0.1, 0.0, 0.2, 0.4, 0.7, 1.0])


def steps(weight: torch.Tensor, found: QuantizedWeight, group: int) -> torch.Tensor:
    """Errors in steps of the codes."""
    scale = found.scale.values().repeat_interleave(group, 1)
    return (found.dequantize().reshape(weight.shape[0], -1) - weight.reshape(weight.shape[0], -1)).abs() / scale


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_integer_is_off_by_more_than_half_a_step(bits: int, symmetric: bool) -> None:
    weight = torch.randn(6, 64) + 0.3
    found = quantize_integer(weight, bits, 16, symmetric=symmetric)
    # The zero point is rounded as well, which may move the ends of the range by another half.
    assert steps(weight, found, 16).max() <= (0.5 if symmetric else 1) + 1e-4
    assert steps(weight, found, 16).mean() < 0.3
    assert found.number.bits == bits


def test_the_affine_grid_is_that_of_the_formula() -> None:
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0, 0.5, 1.5, 2.5, 3.0]])
    found = quantize_integer(weight, 2, symmetric=False)
    assert found.scale.values().tolist() == [[1.0]]
    assert found.zero is not None
    assert found.zero.tolist() == [[0]]
    assert found.dequantize()[0, :4].tolist() == [0.0, 1.0, 2.0, 3.0]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_codes_leave_the_most_negative_out(bits: int) -> None:
    weight = torch.linspace(-1, 1, 64).reshape(1, 64)
    values = quantize_integer(weight, bits).dequantize()
    assert torch.allclose(values, -values.flip(1))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_and_groups_of_zeros_stay_zero(symmetric: bool, dtype: torch.dtype) -> None:
    weight = torch.randn(4, 32).to(dtype)
    weight[1] = 0
    weight[2, :16] = 0
    found = quantize_integer(weight, 4, 16, symmetric=symmetric, scales=torch.float16).dequantize()
    assert found.isfinite().all()
    assert not found[1].any()
    assert not found[2, :16].any()


def test_groups_that_do_not_divide_become_smaller() -> None:
    assert quantize_integer(torch.randn(2, 48), 4, 64).groups == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    weight = torch.randn(4, 16)
    weight[2, 3] = value
    for attempt in (
        lambda: quantize_integer(weight, 8),
        lambda: quantize_float8(weight),
        lambda: quantize_table(weight, TABLE, 3, 8),
    ):
        with pytest.raises(HastenError, match="NaN or infinite .1 of 64 places"):
            attempt()


def test_scales_that_do_not_fit_their_type_are_refused() -> None:
    with pytest.raises(HastenError, match="float16 overflow"):
        quantize_integer(torch.full((1, 8), 1e6), 4, scales=torch.float16)
    assert quantize_integer(torch.full((1, 8), 1e6), 4, scales=torch.bfloat16).dequantize().isfinite().all()


@pytest.mark.parametrize("number", FLOAT8)
@pytest.mark.parametrize(("block", "groups"), [("tensor", 1), ("row", 1), ("block", 2)])
def test_float8_is_as_near_as_its_mantissa_allows(number: str, block: str, groups: int) -> None:
    weight = torch.randn(256, 256) * torch.logspace(-1, 1, 256).unsqueeze(1)
    found = quantize_float8(weight, number, block=block)
    error = (found.dequantize() - weight).abs() / weight.abs().clamp(min=1e-2)
    assert error.max() < (0.07 if number == "float8_e4m3fn" else 0.14)
    assert found.groups == groups
    assert found.scale.codes.shape[0] == (1 if block == "tensor" else 256)


def test_blocks_share_one_scale_over_128_rows() -> None:
    scale = quantize_float8(torch.randn(256, 256), block="block").scale.values()
    assert all(len(part.unique()) == 1 for part in (scale[:128, 0], scale[128:, 0], scale[128:, 1]))
    assert len(scale.unique()) == 4


def test_the_largest_number_keeps_its_value() -> None:
    weight = torch.randn(8, 128)
    places = weight.abs().argmax(1, keepdim=True)
    for found in (quantize_float8(weight), quantize_integer(weight, 8)):
        assert torch.allclose(found.dequantize().gather(1, places), weight.gather(1, places), rtol=1e-6)


def test_the_nearest_entry_is_taken() -> None:
    values = torch.randn(1000)
    brute = (values.unsqueeze(1) - TABLE).abs().argmin(1)
    assert torch.equal(nearest_entry(values, TABLE).long(), brute)
    unordered = TABLE[torch.tensor([3, 0, 7, 1, 6, 2, 5, 4])]
    assert torch.equal(unordered[nearest_entry(values, unordered).long()], TABLE[brute])


def test_tables_are_scaled_to_the_group() -> None:
    weight = torch.randn(4, 32)
    found = quantize_table(weight, TABLE, 3, 8)
    assert torch.equal(found.scale.values(), weight.reshape(4, 4, 8).abs().amax(-1))
    assert found.table is not TABLE
    again = quantize_table(found.dequantize(), TABLE, 3, 8)
    # A group whose largest number was negative and is +1 on no other place keeps its scale: both ends are entries.
    assert torch.equal(again.codes, found.codes)


def test_without_storage_shapes_are_right() -> None:
    weight = torch.empty(8, 64, device="meta")
    real = torch.randn(8, 64)
    for make in (
        lambda w: quantize_integer(w, 4, 16, symmetric=False),  # pyright: ignore
        lambda w: quantize_float8(w, block="block"),  # pyright: ignore
        lambda w: quantize_table(w, TABLE, 3, 16),  # pyright: ignore
    ):
        described = [{n: (t.shape, t.dtype) for n, t in make(w).tensors().items()} for w in (weight, real)]
        assert described[0] == described[1]
