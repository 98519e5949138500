"""bitsandbytes files against the library itself: its layers' tensors in, the same values, the same tensors out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hasten.formats.bitsandbytes import BitsAndBytes
from hasten.formats.format import BadFile, Entry
from hasten.kernels.modules import Input
from hasten.kernels.rounding import quantize_integer
from tests.formats.help import entries_of, round_trip, same_tensors, save, values, written

bnb: Any = pytest.importorskip("bitsandbytes")


def four_bit_layer(inputs: int, outputs: int, dtype: torch.dtype, kind: str, double: bool) -> Any:
    """A layer of the library, quantized on the CPU."""
    torch.manual_seed(inputs)
    plain = torch.nn.Linear(inputs, outputs).to(dtype)
    layer = bnb.nn.Linear4bit(inputs, outputs, quant_type=kind, compress_statistics=double)
    layer.load_state_dict(plain.state_dict())
    layer = layer.to(dtype)
    return layer.to("cpu") if layer.weight.bnb_quantized else _quantized(layer)


def _quantized(layer: Any) -> Any:
    layer.weight = layer.weight._quantize("cpu")
    return layer


def dequantized(packed: torch.Tensor, known: Any) -> torch.Tensor:
    """The values by the formula of the library's documentation."""
    absmax = known.absmax
    if known.nested:
        absmax = bnb.functional.dequantize_blockwise(absmax, known.state2) + known.offset
    halves = [half for byte in packed.reshape(-1).tolist() for half in (byte >> 4, byte & 15)]
    found = known.code[halves] * absmax.repeat_interleave(known.blocksize)[: len(halves)]
    return found.reshape(known.shape)


def state(layer: Any, prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}.{key}": tensor for key, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize(
    ("inputs", "outputs", "dtype"),
    [(128, 24, torch.bfloat16), (96, 40, torch.float32), (640, 52, torch.float16), (24, 10, torch.float32)],
)
def test_layers_of_the_library_are_read_and_written_to_the_last_bit(
    tmp_path: Path, kind: str, double: bool, inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    layer = four_bit_layer(inputs, outputs, dtype, kind, double)
    tensors = state(layer, "blocks.0.a")
    entries = round_trip(BitsAndBytes(), tensors, tmp_path)
    assert set(entries) == {"blocks.0.a.weight", "blocks.0.a.bias"}
    assert torch.equal(
        values(entries["blocks.0.a.weight"]), dequantized(tensors["blocks.0.a.weight"], layer.weight.quant_state)
    )
    if inputs % 64 == 0:  # the library's kernel for CPUs takes the scales of other rows otherwise
        expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        assert torch.equal(values(entries["blocks.0.a.weight"]).to(dtype), expected)


@pytest.mark.parametrize("kind", ["nf4", "nf4_double", "fp4", "fp4_double"])
def test_what_is_quantized_here_is_what_the_library_would_have_written(tmp_path: Path, kind: str) -> None:
    weight = torch.randn(48, 80)
    entry = BitsAndBytes().quantize("blocks.0.a.weight", weight, kind)
    path = written(BitsAndBytes(), {"blocks.0.a.weight": entry}, tmp_path / "x.safetensors")
    layer = bnb.nn.Linear4bit(80, 48, bias=False, quant_type=kind[:3], compress_statistics=kind.endswith("double"))
    layer.weight.data = weight
    ours, theirs = safetensors.torch.load_file(path), state(_quantized(layer), "blocks.0.a")
    if kind.endswith("double"):  # the library's kernel for CPUs, unlike that for GPUs, is off by a code now and then
        codes = [tensors.pop("blocks.0.a.weight.absmax").int() for tensors in (ours, theirs)]
        assert (codes[0] - codes[1]).abs().max() <= 1
    same_tensors(ours, theirs)


def test_eight_bit_layers(tmp_path: Path) -> None:
    layer = bnb.nn.Linear8bitLt(48, 16, has_fp16_weights=False)
    plain = layer.weight.data.clone()
    layer = layer.to("cpu")
    layer(torch.zeros(1, 48))
    tensors = state(layer, "blocks.0.a")
    entries = round_trip(BitsAndBytes(), tensors, tmp_path)
    codes, absmax = tensors["blocks.0.a.weight"], tensors["blocks.0.a.SCB"]
    assert torch.allclose(values(entries["blocks.0.a.weight"]), codes * absmax[:, None] / 127, rtol=1e-6)
    made = BitsAndBytes().encode("blocks.0.a.weight", BitsAndBytes().quantize("blocks.0.a.weight", plain, "int8"))
    same_tensors(made, {name: tensor for name, tensor in tensors.items() if not name.endswith("bias")})


def test_other_quantized_weights_are_not_accepted() -> None:
    made = BitsAndBytes().quantize("blocks.0.a.weight", torch.randn(16, 64), "nf4")
    assert BitsAndBytes().accepts(made)
    assert not BitsAndBytes().accepts(Entry(made.weight, Input(rotation=4)))
    assert not BitsAndBytes().accepts(Entry(quantize_integer(torch.randn(16, 64), 4, 64)))
    assert not BitsAndBytes().accepts(Entry(quantize_integer(torch.randn(16, 64), 8)))


@pytest.mark.parametrize(
    "change",
    [
        {"shape": [40, 97]},
        {"blocksize": 63},
        {"quant_type": "nf5"},
        {"shape": "x"},
        {"nested_offset": "1"},
        {"dtype": 3},
    ],
)
def test_states_that_do_not_fit_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    tensors = state(four_bit_layer(96, 40, torch.float32, "nf4", True), "a")
    key = "a.weight.quant_state.bitsandbytes__nf4"
    facts = json.loads(bytes(tensors[key].tolist())) | change
    tensors[key] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
    path = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(BadFile, match=r"a\.weight"):
        entries_of(BitsAndBytes(), path)


def test_tiles_of_a_card_are_refused(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.zeros(4, 8, dtype=torch.int8), "a.SCB": torch.ones(4),
        "a.weight_format": torch.tensor(1, dtype=torch.uint8),
    }  # fmt: skip
    with pytest.raises(BadFile, match="tiles"):
        entries_of(BitsAndBytes(), save(tmp_path / "x.safetensors", tensors))
