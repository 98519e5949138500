"""The one form of a quantized weight."""

from __future__ import annotations

import pytest
import torch

from hasten.kernels.numbers import NUMBERS
from hasten.kernels.packing import pack
from hasten.kernels.rounding import quantize_integer
from hasten.kernels.weight import TENSORS, QuantizedWeight, Scales, spread


def full(rows: int = 4, columns: int = 32, shape: tuple[int, ...] | None = None) -> QuantizedWeight:
    """A weight that uses everything: scales and minima that are coded, zero points, and a table."""
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, 16, (rows, columns), generator=generator, dtype=torch.uint8)
    coded = torch.randint(0, 8, (rows, columns // 8), generator=generator, dtype=torch.uint8)
    coarse = torch.rand(rows, columns // 16, generator=generator) + 0.5
    scale = Scales(coded, coarse.half(), torch.linspace(0.1, 1, 8), torch.tensor(0.25))
    minimum = Scales(coded.flip(0).to(torch.int8), coarse)
    zero = torch.randint(0, 3, (rows, columns // 8), generator=generator, dtype=torch.uint8)
    table = torch.linspace(-1, 1, 16)
    return QuantizedWeight(
        shape or (rows, columns), NUMBERS["table4"], columns, pack(codes, 4), scale, minimum, zero, table
    )


def slow(weight: QuantizedWeight) -> torch.Tensor:
    """The values by the definition, one at a time."""
    from hasten.kernels.packing import unpack

    codes = unpack(weight.codes, 4, weight.columns)
    assert weight.minimum is not None
    assert weight.zero is not None
    assert weight.table is not None
    assert weight.scale.table is not None
    assert weight.scale.coarse is not None
    assert weight.minimum.coarse is not None
    found = torch.zeros(codes.shape)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            group, wide = column // 8, column // 16
            scale = weight.scale.table[int(weight.scale.codes[row, group])] * weight.scale.coarse[row, wide] + 0.25
            least = weight.minimum.codes[row, group] * weight.minimum.coarse[row, wide]
            code = weight.table[int(codes[row, column])] - weight.zero[row, group]
            found[row, column] = code * scale - least
    return found.reshape(weight.shape)


def test_values_are_those_of_the_definition() -> None:
    assert torch.allclose(full().dequantize(), slow(full()), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in NUMBERS if name.startswith(("int", "uint"))])
def test_integers_read_as_their_names_say(name: str) -> None:
    number = NUMBERS[name]
    values = torch.arange(number.least, number.greatest + 1)
    values = values.repeat(8)[: max(8, len(values))]
    stored = values.to(torch.int8) if number.dtype == torch.int8 else (values + number.shift).to(torch.uint8)
    codes = pack(stored.unsqueeze(0), number.bits) if number.packed else stored.unsqueeze(0)
    weight = QuantizedWeight((1, len(values)), number, len(values), codes, Scales(torch.ones(1, 1)))
    assert torch.equal(weight.dequantize(), values.float().unsqueeze(0))
    assert (number.least < 0) == name.startswith("int")


def test_taking_apart_and_putting_together() -> None:
    weight = full()
    tensors = weight.tensors()
    assert set(tensors) < set(TENSORS)
    again = QuantizedWeight.of(weight.shape, "table4", weight.columns, tensors)
    assert torch.equal(again.dequantize(), weight.dequantize())
    assert weight.map(torch.clone).nbytes == weight.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert weight.map(lambda t: t.to("meta")).codes.device.type == "meta"


@pytest.mark.parametrize("sizes", [[4, 2, 2], [1] * 8])
def test_cutting_a_fused_weight_loses_nothing(sizes: list[int]) -> None:
    weight = full(8, 32)
    parts = weight.split(sizes)
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), weight.dequantize())
    assert [part.shape[0] for part in parts] == sizes


def test_blocks_that_run_over_rows() -> None:
    weight = full(3, 32, shape=(8, 12))
    assert torch.equal(weight.dequantize().flatten(), full(3, 32).dequantize().flatten())
    with pytest.raises(ValueError, match="cross the borders"):
        weight.split([4, 4])
    halves = full(6, 16, shape=(8, 12)).split([4, 4])
    assert torch.equal(torch.cat([half.dequantize() for half in halves]), full(6, 16, shape=(8, 12)).dequantize())
    with pytest.raises(ValueError, match="cannot be cut"):
        weight.split([4, 2])


def test_a_grid_of_one_row() -> None:
    weight = full(1, 64, shape=(8, 8))
    assert weight.dequantize().shape == (8, 8)
    assert weight.groups == 8
    with pytest.raises(ValueError, match="cross the borders"):
        weight.split([4, 4])


def test_scales_for_all_rows_are_shared_by_the_parts() -> None:
    weight = quantize_integer(torch.randn(8, 16), 8)
    shared = QuantizedWeight((8, 16), weight.number, 16, weight.codes, Scales(torch.ones(1, 1)))
    assert torch.equal(shared.split([6, 2])[1].dequantize(), weight.codes[6:].float())


def test_bits_count_everything() -> None:
    assert quantize_integer(torch.randn(4, 64), 4, 16, scales=torch.float16).bits_per_weight == 5
    assert quantize_integer(torch.randn(4, 64), 8).bits_per_weight == 8.5


def test_numbers_are_repeated_over_their_groups() -> None:
    assert spread(torch.tensor([[1.0, 2.0]]), 6).tolist() == [[1, 1, 1, 2, 2, 2]]
    assert spread(torch.tensor([[3.0]]), 6).shape == (1, 1)
