"""The number systems of bitsandbytes, against the library."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hasten.core.errors import HastenError
from hasten.kernels.bitsandbytes import (
    Kind,
    dynamic_map,
    flat_scales,
    quantize_4bit,
    quantize_8bit,
    quantize_dynamic,
    table,
)
from hasten.kernels.packing import unpack
from hasten.kernels.weight import QuantizedWeight

library: Any = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(96, 96), (128, 320), (24, 40), (3, 10), (8, 8), (1, 64), (256, 64)]


def packed(weight: QuantizedWeight) -> torch.Tensor:
    """Codes as the library packs them: the first of two in the high bits."""
    codes = unpack(weight.codes, 4, weight.columns).reshape(-1)
    return (codes[::2] << 4 | codes[1::2]).unsqueeze(1)


def test_tables_are_those_of_the_library() -> None:
    assert torch.equal(table("nf4"), library.get_4bit_type("nf4", "cpu"))
    assert torch.equal(table("fp4"), library.get_4bit_type("fp4", "cpu"))
    assert torch.equal(dynamic_map(), library.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("block", [64, 128])
def test_codes_and_scales_of_4_bits(shape: tuple[int, int], kind: Kind, block: int) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plain = torch.randn(shape).to(dtype)
        plain[0, :8] = 0
        codes, state = library.quantize_4bit(plain, blocksize=block, quant_type=kind)
        ours = quantize_4bit(plain, kind, block=block, double=False)
        assert torch.equal(packed(ours), codes)
        assert torch.equal(flat_scales(ours, block).codes.flatten(), state.absmax)
        every = torch.arange(plain.numel()) // block
        wanted = state.code[unpack(ours.codes, 4, ours.columns).flatten().long()] * state.absmax[every]
        assert torch.equal(ours.dequantize().flatten(), wanted)
        if shape[1] % block == 0:  # else the library's kernel for CPUs takes the wrong scales
            assert torch.equal(ours.dequantize(dtype), library.dequantize_4bit(codes, state))


@pytest.mark.parametrize("shape", SHAPES)
def test_scales_that_are_coded(shape: tuple[int, int]) -> None:
    plain = torch.randn(shape) * torch.logspace(-2, 1, shape[0]).unsqueeze(1)
    _, exact = library.quantize_4bit(plain, blocksize=64, quant_type="nf4")
    codes, state = library.quantize_4bit(plain, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = quantize_4bit(plain)
    scales = flat_scales(ours)
    assert torch.equal(packed(ours), codes)
    assert scales.coarse is not None
    assert scales.offset is not None
    assert torch.equal(scales.offset, state.offset)
    assert torch.equal(scales.coarse.flatten(), state.state2.absmax)
    if len(exact.absmax) > 1:
        as_near(scales.codes.flatten(), by_reference(exact.absmax - state.offset), exact.absmax - state.offset)
    values = library.dequantize_blockwise(scales.codes.flatten(), state.state2) + state.offset
    every = torch.arange(plain.numel()) // 64
    wanted = state.code[unpack(ours.codes, 4, ours.columns).flatten().long()] * values[every]
    assert torch.allclose(ours.dequantize().flatten(), wanted, rtol=1e-6)


def by_reference(values: torch.Tensor) -> torch.Tensor:
    """The library's own comparison with every entry, which it does for types its fast kernel has no case for."""
    full = torch.nn.functional.pad(values, (0, -len(values) % 256))
    codes, _ = torch.ops.bitsandbytes.quantize_blockwise.default(full.double(), dynamic_map(), 256)
    return codes[: len(values)]


def as_near(ours: torch.Tensor, theirs: torch.Tensor, values: torch.Tensor, tolerance: float = 1e-7) -> None:
    """Are codes the same, or stand they for entries that are as near: in the middle between two, in float32?"""
    blocks = torch.nn.functional.pad(values, (0, -len(values) % 256)).reshape(-1, 256)
    normal = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()[: len(values)]
    distances = [(dynamic_map()[codes.long()] - normal).abs() for codes in (ours, theirs)]
    assert (ours != theirs).float().mean() < 0.01
    assert ((distances[0] - distances[1]).abs() <= tolerance).all()


def test_coded_numbers_against_both_ways_of_the_library() -> None:
    values = torch.randn(256 * 40)
    ours, absmax = quantize_dynamic(values)
    as_near(ours, by_reference(values), values)
    fast, state = library.quantize_blockwise(values, blocksize=256)
    assert torch.equal(absmax, state.absmax)
    # The library's kernel for CPUs knows numbers to 1/32768 only.
    as_near(ours, fast, values, tolerance=2 / 32768)


@pytest.mark.parametrize("shape", SHAPES)
def test_codes_and_scales_of_8_bits(shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        plain = torch.randn(shape).to(dtype)
        codes, absmax, _ = library.int8_vectorwise_quant(plain.half())
        ours = quantize_8bit(plain)
        assert torch.equal(ours.codes, codes)
        assert torch.equal(ours.scale.codes.flatten(), absmax)
        assert torch.allclose(ours.dequantize(), library.int8_vectorwise_dequant(codes, absmax), rtol=1e-6, atol=0)


def test_zeros_and_numbers_that_are_too_large() -> None:
    for made in (quantize_4bit(torch.zeros(8, 64)), quantize_8bit(torch.zeros(8, 64))):
        assert not made.dequantize().any()
    assert quantize_4bit(torch.full((8, 64), 1e6)).dequantize().isfinite().all()
    with pytest.raises(HastenError, match="beyond float16"):
        quantize_8bit(torch.full((8, 64), 1e6))
    with pytest.raises(HastenError, match="whole bytes"):
        quantize_4bit(torch.randn(3, 3))


def test_the_bits_that_it_takes() -> None:
    weight = torch.randn(256, 512)
    assert quantize_4bit(weight, double=False).bits_per_weight == pytest.approx(4.5, abs=0.01)
    assert quantize_4bit(weight).bits_per_weight == pytest.approx(4.127 + 8 * 1024 / weight.numel(), abs=0.01)
    rows = quantize_4bit(weight, double=False)
    assert rows.columns == 512
    assert rows.split([128, 128])[1].dequantize().equal(rows.dequantize()[128:])
    whole = quantize_4bit(weight)
    assert whole.split([128, 128])[1].dequantize().equal(whole.dequantize()[128:])


def test_without_storage() -> None:
    real, empty = (quantize_4bit(torch.empty(48, 80, device=d).fill_(1)) for d in ("cpu", "meta"))
    assert {n: (t.shape, t.dtype) for n, t in real.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in empty.tensors().items()
    }
