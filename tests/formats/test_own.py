"""hasten's own layout: any entry, back to a module that computes the same, and descriptions that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hasten.formats.format import BadFile, Entry
from hasten.formats.mapped import TensorFile
from hasten.formats.own import Own
from hasten.kernels.bitsandbytes import quantize_4bit
from hasten.kernels.modules import Input, LowRank, QuantizedLinear, build
from hasten.kernels.rounding import quantize_float8, quantize_integer
from tests.formats.help import entries_of, same_entry, save, written

WEIGHT = torch.randn(16, 64)
ENTRIES = {
    "int3 with zeros": Entry(quantize_integer(WEIGHT, 3, 32, symmetric=False, scales=torch.bfloat16)),
    "float8 with a fixed scale": Entry(quantize_float8(WEIGHT), Input(activations="float8", scale=torch.tensor(0.5))),
    "nf4 with coded scales": Entry(quantize_4bit(WEIGHT), Input(compute=torch.bfloat16)),
    "all at once": Entry(
        quantize_integer(WEIGHT, 8),
        Input(torch.rand(64) + 0.5, 16, "int8", threshold=6.0),
        LowRank(torch.randn(4, 64), torch.randn(16, 4)),
    ),
}


@pytest.mark.parametrize("what", ENTRIES)
def test_everything_about_a_layer_is_kept(tmp_path: Path, what: str) -> None:
    path = written(Own(), {"blocks.0.a.weight": ENTRIES[what], "b": Entry(torch.ones(2))}, tmp_path / "x.safetensors")
    assert Own().recognizes(path)
    again = entries_of(Own(), path)
    same_entry(again["blocks.0.a.weight"], ENTRIES[what])
    assert again["blocks.0.a.weight"].given.threshold == ENTRIES[what].given.threshold
    assert again["blocks.0.a.weight"].given.compute == ENTRIES[what].given.compute


@pytest.mark.parametrize("what", ENTRIES)
def test_a_module_is_described_by_its_file(tmp_path: Path, what: str) -> None:
    entry = ENTRIES[what]
    assert not isinstance(entry.weight, torch.Tensor)
    layer = QuantizedLinear(entry.weight, torch.ones(16), given=entry.given, low_rank=entry.low_rank)
    path = written(Own(), {"a.weight": entry, "a.bias": Entry(torch.ones(16))}, tmp_path / "x.safetensors")
    with TensorFile(path) as file:
        facts = json.loads(file.metadata["hasten"])["layers"]["a.weight"]
    assert facts == layer.describe()
    tensors = {name.removeprefix("a."): tensor for name, tensor in safetensors.torch.load_file(path).items()}
    assert sorted(tensors) == sorted(layer.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(build(facts, tensors)(x), layer(x))


@pytest.mark.parametrize("kind", Own.kinds)
def test_kinds(kind: str) -> None:
    entry = Own().quantize("blocks.0.a.weight", WEIGHT, kind)
    assert not isinstance(entry.weight, torch.Tensor)
    assert (entry.weight.dequantize() - WEIGHT).norm() < 0.1 * WEIGHT.norm()
    assert isinstance(Own().quantize("embed.weight", WEIGHT, kind).weight, torch.Tensor)


FACTS: dict[str, Any] = {"shape": [2, 8], "number": "int8", "columns": 8, "rotation": 1, "activations": "none"}
BAD: dict[str, dict[str, Any]] = {
    "kind of codes": {"number": "int9"}, "no columns": {"columns": 0}, "wrong columns": {"columns": 5},
    "a huge shape": {"shape": [1 << 39, 1 << 39]}, "an empty shape": {"shape": []},
    "a shape of texts": {"shape": ["2", 8]},
    "no power of two": {"rotation": 3}, "a rotation that does not divide": {"rotation": 16},
    "unknown activations": {"activations": "int1"}, "a negative threshold": {"threshold": -1},
    "a type that is none": {"compute": "save"}, "a table that is missing": {"number": "table8"},
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_descriptions_that_do_not_fit_are_refused(tmp_path: Path, what: str) -> None:
    tensors = {"a.codes": torch.zeros(2, 8, dtype=torch.int8), "a.scale": torch.ones(2, 1)}
    text = json.dumps({"version": 1, "layers": {"a.weight": FACTS | BAD[what]}})
    with pytest.raises(BadFile):
        entries_of(Own(), save(tmp_path / "x.safetensors", tensors, {"hasten": text}))


@pytest.mark.parametrize("change", [
    {"scale": torch.ones(3, 1)}, {"scale": torch.ones(2, 3)}, {"codes": torch.zeros(2, 7, dtype=torch.int8)},
    {"codes": torch.zeros(2, 8)}, {"smooth": torch.ones(7)}, {"down": torch.ones(2, 8)}, {"zero": torch.ones(5, 5)},
    {"smooth": torch.ones(8).int()}, {"input_scale": torch.ones(2)}, {"scale_coarse": torch.ones(2, 2)},
    {"down": torch.ones(2, 8), "up": torch.ones(2, 3)}, {"scale_table": torch.ones(256)},
])  # fmt: skip
def test_tensors_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    tensors = {"codes": torch.zeros(2, 8, dtype=torch.int8), "scale": torch.ones(2, 1)} | change
    text = json.dumps({"version": 1, "layers": {"a.weight": FACTS}})
    path = save(tmp_path / "x.safetensors", {f"a.{key}": tensor for key, tensor in tensors.items()}, {"hasten": text})
    with pytest.raises(BadFile):
        entries_of(Own(), path)


def test_other_versions_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", {}, {"hasten": '{"version": 2, "layers": {}}'})
    with pytest.raises(BadFile, match="version 2"):
        Own().open(path)
