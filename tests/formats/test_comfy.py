"""ComfyUI's newer files by slow loops over the documented layouts, and the same tensors again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.formats.comfy.format import ComfyQuant
from hasten.formats.format import BadFile, Entry
from hasten.formats.fp4 import E2M1, tiled, untiled
from hasten.kernels.hadamard import hadamard
from hasten.kernels.modules import Input, QuantizedLinear
from hasten.kernels.rounding import quantize_integer
from tests.formats.help import entries_of, raw, round_trip, save, values, written

E4M3 = torch.float8_e4m3fn


def text(**facts: Any) -> torch.Tensor:
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


def layer(facts: dict[str, Any], **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"a.{key}": tensor for key, tensor in tensors.items()} | {
        "a.comfy_quant": text(**facts),
        "a.bias": torch.ones(2),
    }


def effective(entry: Entry) -> torch.Tensor:
    """The weight that a plain layer would need, rotation undone."""
    assert not isinstance(entry.weight, torch.Tensor)
    return QuantizedLinear(entry.weight, given=entry.given).effective()


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
def test_float8(tmp_path: Path, dtype: torch.dtype) -> None:
    facts = {"format": str(dtype).removeprefix("torch.")}
    codes, scale = torch.randn(4, 6).to(dtype), torch.tensor(0.5)
    tensors = layer(facts, weight=codes, weight_scale=scale, input_scale=torch.tensor([0.1]))
    entry = round_trip(ComfyQuant(), tensors, tmp_path)["a.weight"]
    assert torch.equal(values(entry), codes.float() * scale)
    assert entry.given.activations == "float8"
    tensors["a.comfy_quant"] = text(**facts, full_precision_matrix_mult=True)
    assert round_trip(ComfyQuant(), tensors, tmp_path)["a.weight"].given.activations == "none"
    del tensors["a.weight_scale"]
    assert torch.equal(values(round_trip(ComfyQuant(), tensors, tmp_path)["a.weight"]), codes.float())


def test_layers_may_be_described_in_the_metadata(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(4, 6).to(E4M3), "a.weight_scale": torch.tensor(2.0), "b.weight": torch.ones(3)}
    described = {"format_version": "1.0", "layers": {"a": {"format": "float8_e4m3fn"}, "gone": {"format": "x"}}}
    entries = round_trip(ComfyQuant(), tensors, tmp_path, {"_quantization_metadata": json.dumps(described)})
    assert torch.equal(values(entries["a.weight"]), 2 * tensors["a.weight"].float())


def tile_place(row: int, column: int, wide: int) -> int:
    """Where the block scale of a row lies: tiles of 128 x 4, rows 32 apart next to each other."""
    tile = row // 128 * (wide // 4) + column // 4
    return tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4


def test_block_scales_lie_in_tiles() -> None:
    plain = torch.rand(130, 6).to(E4M3)
    found = tiled(plain)
    assert found.shape == (256, 8)
    flat = found.float().reshape(-1)
    for row, column in itertools.product(range(130), range(6)):
        assert flat[tile_place(row, column, 8)] == plain[row, column].float()
    assert raw(untiled(found, 130, 6)) == raw(plain)
    assert flat.count_nonzero() == plain.float().count_nonzero()


def test_nvfp4(tmp_path: Path) -> None:
    codes, whole = torch.randint(0, 256, (3, 32), dtype=torch.uint8), torch.tensor(0.01)
    blocks = torch.rand(3, 4).mul(9).to(E4M3)
    factor = torch.rand(64).add(0.5).bfloat16()
    tensors = layer(
        {"format": "nvfp4"}, weight=codes, weight_scale=tiled(blocks), weight_scale_2=whole,
        input_scale=torch.tensor(0.2), pre_quant_scale=factor,
    )  # fmt: skip
    entry = round_trip(ComfyQuant(), tensors, tmp_path)["a.weight"]
    for row, column in itertools.product(range(3), range(64)):
        code = int(codes[row, column // 2]) >> (4 if column % 2 == 0 else 0) & 15
        assert values(entry)[row, column] == E2M1[code] * (blocks[row, column // 16].float() * whole)
    assert entry.given.smooth is not None
    assert torch.allclose(entry.given.smooth.float(), 1 / factor.float())


@pytest.mark.parametrize("as_bytes", [False, True])
def test_mxfp8(tmp_path: Path, as_bytes: bool) -> None:
    codes, powers = torch.randn(3, 64).to(E4M3), torch.randint(120, 130, (3, 2), dtype=torch.uint8)
    scale = tiled(powers) if as_bytes else tiled(powers.view(torch.float8_e8m0fnu))
    tensors = layer({"format": "mxfp8"}, weight=codes, weight_scale=scale)
    source = save(tmp_path / "x.safetensors", tensors)  # the library has no name for e8m0
    entries = entries_of(ComfyQuant(), source)
    for row, column in itertools.product(range(3), range(64)):
        expected = codes[row, column].float() * 2.0 ** (int(powers[row, column // 32]) - 127)
        assert values(entries["a.weight"])[row, column] == expected
    copy = written(ComfyQuant(), entries, tmp_path / "y.safetensors")
    again = entries_of(ComfyQuant(), copy)["a.weight"]
    assert torch.equal(values(again), values(entries["a.weight"]))
    assert again.notes == entries["a.weight"].notes


@pytest.mark.parametrize("scale", [torch.tensor(0.1), torch.rand(4, 1), torch.rand(1)])
def test_int8(tmp_path: Path, scale: torch.Tensor) -> None:
    codes = torch.randint(-128, 128, (4, 32), dtype=torch.int8)
    tensors = layer({"format": "int8_tensorwise"}, weight=codes, weight_scale=scale)
    entry = round_trip(ComfyQuant(), tensors, tmp_path)["a.weight"]
    assert torch.equal(values(entry), codes.float() * scale)
    assert entry.given == Input(activations="int8")


def test_rotated_int8_and_int4(tmp_path: Path) -> None:
    codes, scale, turn = torch.randint(-128, 128, (4, 32), dtype=torch.int8), torch.rand(4, 1), hadamard(16)
    facts = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 16}
    entry = round_trip(ComfyQuant(), layer(facts, weight=codes, weight_scale=scale), tmp_path)["a.weight"]
    expected = (codes.float() * scale).reshape(4, 2, 16) @ turn
    assert torch.allclose(effective(entry), expected.reshape(4, 32), atol=1e-4)
    packed = torch.randint(-128, 128, (4, 32), dtype=torch.int8)
    facts = {"format": "convrot_w4a4", "convrot_groupsize": 16, "quant_group_size": 64, "linear_dtype": "int4"}
    entry = round_trip(ComfyQuant(), layer(facts, weight=packed, weight_scale=scale.reshape(-1)), tmp_path)["a.weight"]
    for row, column in itertools.product(range(4), range(64)):
        half = int(packed[row, column // 2]) >> 4 * (column % 2) & 15
        assert values(entry)[row, column] == (half - 16 * (half > 7)) * scale[row, 0]
    assert entry.given == Input(rotation=16, activations="int8")


@pytest.mark.parametrize("table", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
def test_w4a8_decodes_through_8_bits(tmp_path: Path, table: bool, corrected: bool) -> None:
    packed, relative = torch.randint(-128, 128, (3, 16), dtype=torch.int8), torch.rand(3, 2).mul(100).to(E4M3)
    channel, levels = torch.rand(3), torch.linspace(-1, 1, 16) if table else torch.arange(16.0) - 8
    shift = torch.randn(2, 3)
    tensors = layer(
        {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 16},
        weight=packed, weight_s_rel=relative, weight_s_channel=channel,
    )  # fmt: skip
    tensors |= {"a.weight_codebook": levels} if table else {}
    tensors |= {"a.weight_correction": shift} if corrected else {}
    entry = entries_of(ComfyQuant(), save(tmp_path / "x.safetensors", tensors))["a.weight"]
    for row, column in itertools.product(range(3), range(32)):
        code = int(packed[row, column // 2]) >> 4 * (column % 2) & 15
        level = (levels[code] * relative[row, column // 16].float()).round().clamp(-127, 127)
        expected = level * channel[row] + (shift[column // 16, row] if corrected else 0)
        assert torch.allclose(values(entry)[row, column], expected)
    assert entry.given == Input(rotation=16, activations="int8")


def test_awq(tmp_path: Path) -> None:
    packed = torch.randint(-128, 128, (3, 16), dtype=torch.int8)
    scale, zero = torch.rand(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()
    tensors = layer({"format": "awq_w4a16", "group_size": 16}, weight=packed, weight_scale=scale, weight_zeros=zero)
    entry = round_trip(ComfyQuant(), tensors, tmp_path)["a.weight"]
    for row, column in itertools.product(range(3), range(32)):
        code, group = int(packed[row, column // 2]) >> 4 * (column % 2) & 15, column // 16
        assert values(entry)[row, column] == (code - 8) * scale[group, row].float() + zero[group, row].float()


@pytest.mark.parametrize("kind", ComfyQuant.kinds)
def test_what_is_quantized_can_be_written_and_read(tmp_path: Path, kind: str) -> None:
    weight = torch.randn(32, 128)
    entry = ComfyQuant().quantize("blocks.0.a.weight", weight, kind)
    path = written(ComfyQuant(), {"blocks.0.a.weight": entry}, tmp_path / "x.safetensors")
    assert ComfyQuant().recognizes(path)
    again = entries_of(ComfyQuant(), path)["blocks.0.a.weight"]
    assert torch.equal(values(again), values(entry))
    assert again.given == entry.given
    assert (effective(entry) - weight).norm() < 0.2 * weight.norm()


def test_unknown_formats_are_refused_by_name(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", layer({"format": "int3_magic"}, weight=torch.zeros(2, 2)))
    with pytest.raises(BadFile, match="int3_magic"):
        ComfyQuant().open(path)
    assert not ComfyQuant().accepts(Entry(quantize_integer(torch.randn(16, 32), 5)))
