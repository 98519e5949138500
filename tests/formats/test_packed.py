"""GPTQ's and AutoAWQ's packed checkpoints by slow loops over their definition, and the same tensors again."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from hasten.formats.format import BadFile, Entry
from hasten.formats.packed import AWQ, AWQ_ORDER, GPTQ, pack_words, unpack_words
from hasten.kernels.modules import Input
from hasten.kernels.rounding import quantize_integer
from tests.formats.help import entries_of, raw, round_trip, save, values, written

INPUTS, OUTPUTS, GROUPS = 64, 32, 4


def words(*shape: int) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def bit_stream(column: list[int], bits: int) -> list[int]:
    """Codes of a column of words, which hold them one after the other from the lowest bit up."""
    whole = sum((word & 0xFFFFFFFF) << 32 * place for place, word in enumerate(column))
    return [whole >> bits * place & (1 << bits) - 1 for place in range(32 * len(column) // bits)]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_hold_a_stream_of_bits(bits: int) -> None:
    packed = words(3 * bits, 5)
    found = unpack_words(packed, bits)
    for column in range(5):
        assert found[:, column].tolist() == bit_stream(packed[:, column].tolist(), bits)
    assert raw(pack_words(found, bits)) == raw(packed)


def gptq(bits: int, order: torch.Tensor | None) -> dict[str, torch.Tensor]:
    found = {
        "a.qweight": words(INPUTS * bits // 32, OUTPUTS), "a.qzeros": words(GROUPS, OUTPUTS * bits // 32),
        "a.scales": torch.rand(GROUPS, OUTPUTS).half(), "a.bias": torch.rand(OUTPUTS).half(),
    }  # fmt: skip
    return found | ({} if order is None else {"a.g_idx": order.int()})


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("order", ["none", "plain", "act-order"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_layers(tmp_path: Path, bits: int, order: str, later: bool) -> None:
    plain = torch.arange(INPUTS) // (INPUTS // GROUPS)
    groups = plain[torch.randperm(INPUTS)] if order == "act-order" else plain
    tensors = gptq(bits, None if order == "none" else groups)
    if later:
        config = {"quantization_config": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"}}
        (tmp_path / "config.json").write_text(json.dumps(config))
    entry = round_trip(GPTQ(), tensors, tmp_path)["a.weight"]
    found = values(entry)
    for n, k in itertools.product(range(0, OUTPUTS, 5), range(INPUTS)):
        group = int(groups[k])
        code = bit_stream(tensors["a.qweight"][:, n].tolist(), bits)[k]
        zero = bit_stream(tensors["a.qzeros"][group].tolist(), bits)[n] + (0 if later else 1)
        assert found[n, k] == (code - zero) * tensors["a.scales"][group, n].float()


def test_awq_layers(tmp_path: Path) -> None:
    tensors = {
        "a.qweight": words(INPUTS, OUTPUTS // 8), "a.qzeros": words(GROUPS, OUTPUTS // 8),
        "a.scales": torch.rand(GROUPS, OUTPUTS).half(),
    }  # fmt: skip
    found = values(round_trip(AWQ(), tensors, tmp_path)["a.weight"])
    assert not GPTQ().recognizes(tmp_path / "source.safetensors")
    for k, word, place in itertools.product(range(INPUTS), range(OUTPUTS // 8), range(8)):
        n, group = 8 * word + AWQ_ORDER[place], k // (INPUTS // GROUPS)
        code = int(tensors["a.qweight"][k, word]) >> 4 * place & 15
        zero = int(tensors["a.qzeros"][group, word]) >> 4 * place & 15
        assert found[n, k] == (code - zero) * tensors["a.scales"][group, n].float()


@pytest.mark.parametrize(("layout", "kind"), [(GPTQ(), kind) for kind in GPTQ.kinds] + [(AWQ(), "int4")])
def test_what_is_quantized_can_be_written_and_read(tmp_path: Path, layout: GPTQ | AWQ, kind: str) -> None:
    weight = torch.randn(32, 256)
    entry = layout.quantize("blocks.0.a.weight", weight, kind)
    again = entries_of(layout, written(layout, {"blocks.0.a.weight": entry}, tmp_path / "x.safetensors"))
    assert torch.equal(values(again["blocks.0.a.weight"]), values(entry))
    assert (values(entry) - weight).norm() < 2.2 * 2.0 ** -int(kind[3:]) * weight.norm()


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_integers_fit_as_well(tmp_path: Path, bits: int) -> None:
    entry = Entry(quantize_integer(torch.randn(32, 64), bits, 32))
    again = entries_of(GPTQ(), written(GPTQ(), {"a.weight": entry}, tmp_path / "x.safetensors"))
    assert torch.equal(values(again["a.weight"]), values(entry))


def test_what_does_not_fit_is_not_accepted() -> None:
    assert not GPTQ().accepts(Entry(quantize_integer(torch.randn(40, 64), 4, 32)))
    assert not GPTQ().accepts(Entry(quantize_integer(torch.randn(32, 64), 4, 32), Input(rotation=4)))
    assert not GPTQ().accepts(Entry(quantize_integer(torch.rand(32, 64) + 1, 4, 32, symmetric=False)))
    assert not AWQ().accepts(Entry(quantize_integer(torch.randn(32, 64), 8, 32)))


@pytest.mark.parametrize("change", [{"a.g_idx": torch.full((INPUTS,), 7)}, {"a.qzeros": torch.zeros(GROUPS, 3)}])
def test_layers_that_do_not_fit_together_are_refused(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    tensors = gptq(4, None) | {name: tensor.int() for name, tensor in change.items()}
    with pytest.raises(BadFile):
        entries_of(GPTQ(), save(tmp_path / "x.safetensors", tensors))
