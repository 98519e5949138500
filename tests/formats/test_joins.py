"""Entries joined and cut, with what belongs to them: the layer computes the same before and after."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from torch.nn import functional as F

from hasten.formats.format import Entry
from hasten.formats.keys.joins import Halves, Inputs, Outputs, Pointwise, Transposed
from hasten.kernels.joining import CannotJoin
from hasten.kernels.modules import Input, LowRank, QuantizedLinear
from hasten.kernels.rounding import quantize_integer


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entry(outputs: int, inputs: int, seed: int, *, low: bool = True, smooth: torch.Tensor | None = None) -> Entry:
    branch = LowRank(drawn(2, inputs, seed=seed + 1), drawn(outputs, 2, seed=seed + 2)) if low else None
    return Entry(quantize_integer(drawn(outputs, inputs, seed=seed), 4, 16), Input(smooth=smooth), branch)


def run(found: Entry, x: torch.Tensor) -> torch.Tensor:
    weight = found.weight
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight)
    return QuantizedLinear(weight, given=found.given, low_rank=found.low_rank)(x)


def test_outputs_are_those_of_the_parts() -> None:
    smooth, x = drawn(32).abs() + 0.5, drawn(3, 32, seed=9)
    parts = [
        entry(16, 32, 0, smooth=smooth),
        entry(16, 32, 5, smooth=smooth, low=False),
        entry(16, 32, 7, smooth=smooth),
    ]
    whole = Outputs().join(parts)
    assert torch.allclose(run(whole, x), torch.cat([run(part, x) for part in parts], -1), atol=1e-5)
    for part, again in zip(parts, Outputs().split(whole, 3), strict=True):
        assert torch.allclose(run(part, x), run(again, x), atol=1e-5)


def test_a_common_first_half_of_side_branches_stays_common() -> None:
    down = drawn(2, 32)
    parts = [Entry(drawn(8, 32), low_rank=LowRank(down, drawn(8, 2, seed=s))) for s in (1, 2)]
    branch = Outputs().join(parts).low_rank
    assert branch is not None
    assert branch.down.shape == (2, 32)


def test_the_sum_of_parts_along_the_inputs() -> None:
    x, y = drawn(3, 16, seed=9), drawn(3, 64, seed=10)
    one, other = entry(8, 16, 0, smooth=drawn(16).abs() + 0.5), entry(8, 64, 3)
    joined = Inputs((1, 4)).join([one, other])
    both = torch.cat([x, y], -1)
    assert torch.allclose(run(joined, both), run(one, x) + run(other, y), atol=1e-4)
    parts = Inputs((1, 4)).split(joined, 2)
    assert torch.allclose(run(parts[0], x) + run(parts[1], y), run(joined, both), atol=1e-4)


def test_biases_of_parts_along_the_inputs_add_up() -> None:
    whole = Entry(drawn(8))
    parts = Inputs((1, 4)).split(whole, 2)
    assert torch.equal(cast(torch.Tensor, parts[0].weight), torch.zeros(8))
    assert torch.equal(cast(torch.Tensor, Inputs((1, 4)).join(parts).weight), drawn(8))


def test_halves_and_pixels_of_quantized_weights() -> None:
    found = entry(16, 32, 0)
    x = drawn(3, 32, seed=9)
    swapped = Halves().split(found, 1)[0]
    assert torch.allclose(run(swapped, x), run(found, x).roll(8, -1), atol=1e-5)
    assert Pointwise().join([found]).weight.shape == (16, 32, 1, 1)
    assert Pointwise().split(Pointwise().join([found]), 1)[0].weight.shape == (16, 32)


def test_what_cannot_be_joined() -> None:
    plain, coded = Entry(drawn(16, 32)), entry(16, 32, 0, low=False)
    with pytest.raises(CannotJoin, match="in codes and a plain one"):
        Outputs().join([plain, coded])
    with pytest.raises(CannotJoin, match="in codes and a plain one"):
        Inputs((1, 1)).join([plain, coded])
    with pytest.raises(CannotJoin, match="differently smoothed"):
        Outputs().join([coded, entry(16, 32, 0, low=False, smooth=drawn(32))])
    with pytest.raises(CannotJoin, match="transposed"):
        Transposed().split(coded, 1)
    with pytest.raises(CannotJoin, match="of the types"):
        Outputs().join([plain, Entry(drawn(16, 32).half())])
    rotated = Entry(drawn(16, 32), Input(rotation=32))
    with pytest.raises(CannotJoin, match="rotated together"):
        Inputs((1, 1)).split(rotated, 2)
    grid = replace(quantize_integer(drawn(2, 96), 8, 32), shape=(3, 64))
    with pytest.raises(CannotJoin, match="fused weight cannot be cut"):
        Outputs().split(Entry(grid), 3)
