"""nunchaku's files: the packing by slow loops over its definition, biases, modulations, and the same tensors again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from hasten.formats.format import BadFile, Entry
from hasten.formats.fp4 import E2M1
from hasten.formats.nunchaku import packing
from hasten.formats.nunchaku.format import Nunchaku, NunchakuLite
from hasten.formats.nunchaku.layers import SHIFT
from hasten.kernels.modules import Input, LowRank, QuantizedLinear
from hasten.kernels.rounding import quantize_integer
from hasten.kernels.weight import QuantizedWeight
from tests.formats.help import entries_of, raw, round_trip, same_entry, save, values, written

N, K, R = 128, 256, 16
ROWS = list(range(0, N, 11))
"""Outputs that slow loops look at."""


def weight_place(n: int, k: int, inputs: int) -> int:
    """The half byte at which a code lies: tiles of 128 x 64; lanes of 8 rows and 4 columns; words of 8 codes."""
    tile = n // 128 * (inputs // 64) + k // 64
    pack, side, lane = n % 128 // 16, n % 16 // 8, n % 8
    half, column, code = k % 64 // 32, k % 32 // 8, k % 8
    return ((((tile * 8 + pack) * 8 + lane) * 4 + column) * 2 + side) * 16 + half * 8 + code


def vector_place(n: int) -> int:
    """Where the number of output n lies: 16 rows are held by 4 lanes, two neighbours of each half together."""
    return n // 16 * 16 + n % 8 // 2 * 4 + n % 16 // 8 * 2 + n % 2


def micro_place(n: int, block: int, outputs: int) -> int:
    """Where the scale of a block of 16 lies: four blocks of a row together, rows 32 apart next to each other."""
    tile = n // 128 * 512 * (K // 64) + block // 4 * 512 if outputs == 128 else -1
    return tile + n % 8 * 64 + n % 32 // 8 * 16 + n % 128 // 32 * 4 + block % 4


def low_rank_place(c: int, r: int, ranks: int, *, down: bool) -> int:
    """Where an element of a projection lies: tiles of 16 x 16 in the order of lanes."""
    tile = c // 16 * (ranks // 16) + r // 16
    row, column = (r % 16, c % 16) if down else (c % 16, r % 16)
    return tile * 256 + row % 8 * 32 + column % 8 // 2 * 8 + row // 8 * 4 + column // 8 * 2 + column % 2


def test_weights_lie_where_the_definition_says() -> None:
    packed = torch.randint(-128, 128, (N, K // 2), dtype=torch.int8)
    flat = packed.view(torch.uint8).reshape(-1).tolist()
    found = packing.unpack_weight(packed)
    assert raw(packing.pack_weight(found)) == raw(packed)
    for n, k in itertools.product(range(0, N, 5), range(K)):
        place = weight_place(n, k, K)
        assert int(found[n, k // 2]) >> 4 * (k % 2) & 15 == flat[place // 2] >> 4 * (place % 2) & 15


def test_scales_and_vectors_lie_where_the_definition_says() -> None:
    packed = torch.randn(2, 2 * N).bfloat16()
    found = packing.unpack_scales(packed)
    assert raw(packing.pack_scales(found)) == raw(packed)
    for n, group in itertools.product(range(2 * N), range(2)):
        assert found[n, group] == packed.reshape(2, 2, N)[n // N].reshape(-1)[group * N + vector_place(n % N)]
    assert torch.equal(packing.unpack_vector(packed[0])[:16], packed[0][[vector_place(n) for n in range(16)]])
    assert raw(packing.pack_vector(packing.unpack_vector(packed[0]))) == raw(packed[0])


def test_micro_scales_lie_where_the_definition_says() -> None:
    packed = torch.rand(K // 16, N).to(torch.float8_e4m3fn)
    found = packing.unpack_micro_scales(packed)
    assert raw(packing.pack_micro_scales(found)) == raw(packed)
    flat = packed.float().reshape(-1)
    for n, block in itertools.product(range(N), range(K // 16)):
        assert found[n, block].float() == flat[micro_place(n, block, N)]


def test_projections_lie_where_the_definition_says() -> None:
    packed = torch.randn(48, 32).half()
    down, up = packing.unpack_down(packed), packing.unpack_up(packed)
    for c, r in itertools.product(range(48), range(32)):
        assert down[r, c] == packed.reshape(-1)[low_rank_place(c, r, 32, down=True)]
        assert up[c, r] == packed.reshape(-1)[low_rank_place(c, r, 32, down=False)]
    assert raw(packing.pack_down(down)) == raw(packing.pack_up(up)) == raw(packed)


def test_awq_codes_lie_where_the_definition_says() -> None:
    packed = torch.randint(-(2**31), 2**31, (2, 64), dtype=torch.int32)
    words = packed.view(torch.int16).reshape(2, -1)
    found = packing.unpack_awq(packed)
    assert raw(packing.pack_awq(found)) == raw(packed)
    for n, k in itertools.product(range(8), range(128)):
        word = words[n // 4, k // 64 * 64 + n % 4 * 16 + k % 64 // 32 * 8 + k % 8]
        assert int(found[n, k]) == int(word) >> 4 * (k % 32 // 8) & 15


def half(*shape: int) -> torch.Tensor:
    return torch.rand(*shape).add(0.5).bfloat16()


def svdq(base: str, kind: str, *, second: bool = False, rows: int = N, columns: int = K) -> dict[str, torch.Tensor]:
    smooth, down, up = ("smooth_factor", "proj_down", "proj_up") if second else ("smooth", "lora_down", "lora_up")
    scales = half(columns // 64, rows) if kind == "int4" else torch.rand(columns // 16, rows).to(torch.float8_e4m3fn)
    found = {
        "qweight": torch.randint(-128, 128, (rows, columns // 2), dtype=torch.int8), "wscales": scales,
        "bias": half(rows), smooth: half(columns), down: half(columns, R), up: half(rows, R),
    }  # fmt: skip
    if not second:
        found["smooth_orig"] = half(columns)
    if kind != "int4":
        found |= {"wcscales": half(rows), "wtscale": torch.tensor([0.03], dtype=torch.bfloat16)}
    return {f"{base}.{key}": tensor for key, tensor in found.items()}


def awq(base: str, rows: int, columns: int, groups: int) -> dict[str, torch.Tensor]:
    used = (torch.arange(groups) < columns // 64).bfloat16()[:, None]  # the rest fills a kernel's step up with zeros
    return {
        f"{base}.qweight": torch.randint(-(2**31), 2**31, (rows // 4, columns // 2), dtype=torch.int32),
        f"{base}.wscales": half(groups, rows) * used, f"{base}.wzeros": (half(groups, rows) - 2) * used + 0.0,
        f"{base}.bias": half(rows),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["int4", "nvfp4"])
def test_svdquant_layers_compute_what_nunchaku_defines(tmp_path: Path, kind: str) -> None:
    tensors = svdq("single.0.mlp_fc2", kind) | svdq("single.0.qkv_proj", kind) | {"norm.weight": half(8)}
    entries = round_trip(Nunchaku(), tensors, tmp_path, {"model_class": "NunchakuFluxTransformer2dModel"})
    x = torch.randn(3, K, dtype=torch.float64)
    for layer, shift in (("single.0.mlp_fc2", SHIFT if kind == "int4" else 0.0), ("single.0.qkv_proj", 0.0)):
        entry, bias = entries[f"{layer}.weight"], entries[f"{layer}.bias"].weight
        assert isinstance(entry.weight, QuantizedWeight)
        assert isinstance(bias, torch.Tensor)
        given = Input(smooth=entry.given.smooth)
        ours = QuantizedLinear(entry.weight, bias.double(), given=given, low_rank=entry.low_rank)(x)
        expected = by_definition(tensors, layer, kind, x, shift)
        assert torch.allclose(ours[:, ROWS], expected[:, ROWS], atol=1e-4)


def by_definition(
    tensors: dict[str, torch.Tensor], base: str, kind: str, x: torch.Tensor, shift: float
) -> torch.Tensor:
    """nunchaku's product without rounding of activations: the 4-bit part sees (x + shift) / smooth."""
    part = {key.removeprefix(f"{base}."): tensor for key, tensor in tensors.items() if key.startswith(f"{base}.")}
    flat = part["qweight"].view(torch.uint8).reshape(-1).tolist()
    matrix = torch.zeros(N, K, dtype=torch.float64)
    order = [vector_place(n % 128) + n // 128 * 128 for n in range(K)]
    for n, k in itertools.product(ROWS, range(K)):
        place = weight_place(n, k, K)
        code = flat[place // 2] >> 4 * (place % 2) & 15
        if kind == "int4":
            matrix[n, k] = (code - 16 * (code > 7)) * part["wscales"][k // 64, order[n]].double()
        else:
            scale = part["wscales"].float().reshape(-1)[micro_place(n, k // 16, N)]
            matrix[n, k] = E2M1[code] * scale * part["wcscales"][order[n]].float() * part["wtscale"].float()
    inner = (x + shift) / part["smooth"][order].double()
    down, up = packing.unpack_down(part["lora_down"]).double(), packing.unpack_up(part["lora_up"]).double()
    return inner @ matrix.t() + x @ down.t() @ up.t() + part["bias"][order[:N]].double()


def test_modulations_come_out_part_by_part_and_without_the_ones(tmp_path: Path) -> None:
    tensors = awq("norm1.linear", 6 * 64, 64, 8) | awq("embed", 4 * 64, 128, 2)
    entries = round_trip(Nunchaku(), tensors | svdq("a.qkv_proj", "int4"), tmp_path)
    codes = packing.unpack_awq(tensors["norm1.linear.qweight"])
    bias, found = entries["norm1.linear.bias"].weight, values(entries["norm1.linear.weight"])
    assert isinstance(bias, torch.Tensor)
    for part, row in itertools.product(range(6), range(0, 64, 7)):
        stored = 6 * row + part
        scale, zero = (tensors[f"norm1.linear.{key}"][0, stored].float() for key in ("wscales", "wzeros"))
        assert torch.equal(found[64 * part + row], codes[stored].float() * scale + zero)
        assert bias[64 * part + row] == tensors["norm1.linear.bias"][stored].float() - int(part in (1, 4))
    assert torch.equal(values(entries["embed.weight"])[:, 0], packing.unpack_awq(tensors["embed.qweight"])[:, 0].float()
        * tensors["embed.wscales"][0].float() + tensors["embed.wzeros"][0].float())  # fmt: skip


def test_lite_files_are_told_by_their_configuration_and_have_no_shifts(tmp_path: Path) -> None:
    tensors = svdq("ff.net.2", "int4", second=True) | svdq("ff.net.0.proj", "int4", second=True, rows=K)
    tensors |= awq("norm.linear", 3 * 64, 64, 1)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "nunchaku_lite"}}))
    entries = round_trip(NunchakuLite(), tensors, tmp_path)
    assert not Nunchaku().recognizes(tmp_path / "source.safetensors")
    bias = entries["ff.net.2.bias"].weight
    assert isinstance(bias, torch.Tensor)
    assert torch.equal(packing.pack_vector(bias), tensors["ff.net.2.bias"])
    rows = packing.unpack_awq(tensors["norm.linear.qweight"])
    assert values(entries["norm.linear.weight"])[5, 3] == rows[5, 3] * tensors["norm.linear.wscales"][0, 5].float() + (
        tensors["norm.linear.wzeros"][0, 5].float()
    )


@pytest.mark.parametrize(("width", "shifted"), [(K, True), (2 * K, False)])
def test_a_gated_layer_is_not_shifted(tmp_path: Path, width: int, shifted: bool) -> None:
    tensors = svdq("img_mlp.net.2", "int4") | svdq("img_mlp.net.0.proj", "int4", rows=width)
    bias = round_trip(Nunchaku(), tensors, tmp_path)["img_mlp.net.2.bias"].weight
    assert isinstance(bias, torch.Tensor)
    assert (bias.dtype == torch.float32) == shifted


def svdquant() -> Entry:
    weight = quantize_integer(torch.randn(N, K), 4, 64, scales=torch.bfloat16)
    return Entry(weight, Input(smooth=half(K), activations="int8"), LowRank(half(R, K), half(N, R)))


@pytest.mark.parametrize("layout", [Nunchaku(), NunchakuLite()])
def test_what_svdquant_made_can_be_written(tmp_path: Path, layout: Nunchaku) -> None:
    entries = {"a.mlp_fc2.bias": Entry(torch.randn(N)), "a.mlp_fc2.weight": svdquant(), "b.bias": Entry(torch.randn(4))}
    path = written(layout, entries, tmp_path / "x.safetensors")
    assert layout.recognizes(path)
    again = entries_of(layout, path)
    same_entry(again["a.mlp_fc2.weight"], entries["a.mlp_fc2.weight"])
    for name in ("a.mlp_fc2.bias", "b.bias"):
        found, plain = again[name].weight, entries[name].weight
        assert isinstance(found, torch.Tensor)
        assert isinstance(plain, torch.Tensor)
        assert torch.allclose(found.float(), plain, rtol=1e-2, atol=5e-2)
    assert not layout.accepts(Entry(quantize_integer(torch.randn(N, K), 4, 32)))
    assert not layout.accepts(Entry(quantize_integer(torch.randn(96, K), 4, 64, scales=torch.bfloat16)))


def test_layers_that_fill_no_tiles_are_refused(tmp_path: Path) -> None:
    tensors = svdq("a", "int4") | {"a.qweight": torch.zeros(96, 128, dtype=torch.int8)}
    with pytest.raises(BadFile, match="tiles"):
        entries_of(Nunchaku(), save(tmp_path / "x.safetensors", tensors))
