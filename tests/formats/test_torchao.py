"""torchao's flattened tensors. The descriptions are those that torchao 0.18 wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.formats.format import BadFile, Entry
from hasten.formats.torchao import TorchAO
from hasten.kernels.modules import Input
from hasten.kernels.rounding import quantize_integer
from tests.formats.help import entries_of, round_trip, save, values, written

_DTYPE = {"_type": "torch.dtype", "_data": "bfloat16"}
_KWARGS = {
    "_type": "QuantizeTensorToInt8Kwargs",
    "_data": {
        "granularity": {"_type": "PerRow", "_data": {"dim": -1}},
        "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
        "reduce_range": False,
    },
}


def described(kind: str, data: dict[str, Any], names: list[str]) -> dict[str, str]:
    text = json.dumps({"_type": kind, "_data": data, "_tensor_data_names": names})
    return {"a.weight": text, "a.bias": '{"_type": "Tensor"}', "tensor_names": '["a.weight", "a.bias"]'}


def int8(*shape: int, low: int = -128, high: int = 128) -> torch.Tensor:
    return torch.randint(low, high, shape, dtype=torch.int8)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("scale", [(6, 1), (1, 1), (6, 2)])
def test_int8(tmp_path: Path, scale: tuple[int, int], dynamic: bool) -> None:
    data = {
        "act_quant_kwargs": _KWARGS if dynamic else None,
        "reduce_range": False,
        "block_size": [1, 8],
        "dtype": _DTYPE,
    }
    tensors = {
        "a._weight_qdata": int8(6, 8), "a._weight_scale": torch.rand(scale),
        "a._weight_zero_point": torch.zeros(scale, dtype=torch.int8), "a.bias": torch.rand(6).bfloat16(),
    }  # fmt: skip
    entries = round_trip(TorchAO(), tensors, tmp_path, described("Int8Tensor", data, ["zero_point", "qdata", "scale"]))
    entry, columns = entries["a.weight"], tensors["a._weight_scale"].repeat_interleave(8 // scale[1], 1)
    assert torch.equal(values(entry), tensors["a._weight_qdata"].float() * columns)
    assert entry.given == Input(activations="int8" if dynamic else "none")


def test_float8(tmp_path: Path) -> None:
    data = {"block_size": [1, 8], "mm_config": None, "act_quant_kwargs": None, "dtype": _DTYPE}
    tensors = {
        "a._weight_qdata": torch.randn(6, 8).to(torch.float8_e4m3fn), "a._weight_scale": torch.rand(6, 1),
        "a.bias": torch.rand(6),
    }  # fmt: skip
    entries = round_trip(TorchAO(), tensors, tmp_path, described("Float8Tensor", data, ["qdata", "scale"]))
    assert torch.equal(values(entries["a.weight"]), tensors["a._weight_qdata"].float() * tensors["a._weight_scale"])


def test_intx_is_packed_and_keeps_its_zeros(tmp_path: Path) -> None:
    data = {"target_dtype": {"_type": "torch.dtype", "_data": "int4"}, "block_size": [1, 4], "dtype": _DTYPE}
    tensors = {
        "a._weight_qdata": int8(6, 8, low=-8, high=8), "a._weight_scale": torch.rand(6, 2).bfloat16(),
        "a._weight_zero_point": int8(6, 2, low=-8, high=8), "a.bias": torch.rand(6),
    }  # fmt: skip
    metadata = described("IntxUnpackedToInt8Tensor", data, ["qdata", "scale", "zero_point"])
    entry = round_trip(TorchAO(), tensors, tmp_path, metadata)["a.weight"]
    zero, scale = (tensors[f"a._weight_{key}"].float().repeat_interleave(4, 1) for key in ("zero_point", "scale"))
    assert torch.equal(values(entry), (tensors["a._weight_qdata"].float() - zero) * scale)
    assert not isinstance(entry.weight, torch.Tensor)
    assert entry.weight.codes.shape == (6, 4)
    tensors["a._weight_qdata"][0, 0] = 8
    with pytest.raises(BadFile, match="range"):
        entries_of(TorchAO(), save(tmp_path / "x.safetensors", tensors, metadata))


def test_int4_in_halves_of_bytes(tmp_path: Path) -> None:
    tensors = {
        "a._weight_qdata": int8(6, 4), "a._weight_scale": torch.rand(2, 6).bfloat16(),
        "a._weight_zero_point": torch.randn(2, 6).bfloat16(), "a.bias": torch.rand(6),
    }  # fmt: skip
    metadata = described("Int4Tensor", {"block_size": [1, 4], "shape": [6, 8]}, ["qdata", "scale", "zero_point"])
    found = values(round_trip(TorchAO(), tensors, tmp_path, metadata)["a.weight"])
    for n in range(6):
        for k in range(8):
            half = int(tensors["a._weight_qdata"][n, k // 2]) >> 4 * (k % 2) & 15
            scale, zero = (tensors[f"a._weight_{key}"][k // 4, n].float() for key in ("scale", "zero_point"))
            assert found[n, k] == (half - 16 * (half > 7)) * scale + zero


@pytest.mark.parametrize("kind", TorchAO.kinds)
def test_what_is_quantized_can_be_written_and_read(tmp_path: Path, kind: str) -> None:
    weight = torch.randn(32, 64)
    entry = TorchAO().quantize("blocks.0.a.weight", weight, kind)
    path = written(TorchAO(), {"blocks.0.a.weight": entry, "a.bias": Entry(torch.ones(3))}, tmp_path / "x.safetensors")
    again = entries_of(TorchAO(), path)["blocks.0.a.weight"]
    assert torch.equal(values(again), values(entry))
    assert again.given == entry.given
    assert (values(entry) - weight).norm() < 0.12 * weight.norm()
    assert not TorchAO().accepts(Entry(quantize_integer(weight, 4, 32, symmetric=False)))


@pytest.mark.parametrize(
    ("kind", "message"), [("Int4TilePackedTo4dTensor", "Int4TilePackedTo4dTensor"), ("os.system", "class")]
)
def test_other_classes_are_refused_by_name(tmp_path: Path, kind: str, message: str) -> None:
    path = save(tmp_path / "x.safetensors", {"a._weight_qdata": int8(2, 2)}, described(kind, {}, ["qdata", "scale"]))
    with pytest.raises(BadFile, match=message):
        TorchAO().open(path)
