"""fp8_scaled, BFL and ModelOpt files: values by slow loops over the documented layout, and the same tensors again."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from diffusers.quantizers.bfl import utils as bfl_utils

from hasten.formats.bfl import BFL, ModelOpt
from hasten.formats.format import Entry
from hasten.formats.fp4 import E2M1, e2m1_codes, quantize_mxfp8, quantize_nvfp4
from hasten.formats.fp8_scaled import Fp8Scaled
from hasten.kernels.modules import Input
from hasten.kernels.weight import QuantizedWeight
from tests.formats.help import round_trip, same_tensors, values, written

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def fp8(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return torch.randn(*shape).to(dtype)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("names", [("scale_weight", "scale_input"), ("weight_scale", "input_scale")])
def test_fp8_scaled_reads_both_spellings_and_writes_the_same(
    tmp_path: Path, dtype: torch.dtype, names: tuple[str, str]
) -> None:
    tensors = {
        "scaled_fp8": torch.empty(0, dtype=dtype),
        "blocks.0.a.weight": fp8(4, 6, dtype=dtype), f"blocks.0.a.{names[0]}": torch.tensor(0.25),
        f"blocks.0.a.{names[1]}": torch.tensor(0.5), "blocks.0.a.bias": torch.randn(4).half(),
        "blocks.0.b.weight": fp8(3, 2, dtype=dtype), f"blocks.0.b.{names[0]}": torch.tensor([2.0]),
        f"blocks.0.b.{names[1]}": torch.empty(0),
        "blocks.0.c.weight": fp8(3, 2, dtype=dtype), f"blocks.0.c.{names[0]}": torch.empty(0),
        "norm.weight": torch.randn(5).bfloat16(),
    }  # fmt: skip
    entries = round_trip(Fp8Scaled(), tensors, tmp_path)
    assert set(entries) == {
        "blocks.0.a.weight",
        "blocks.0.a.bias",
        "blocks.0.b.weight",
        "blocks.0.c.weight",
        "norm.weight",
    }
    for layer, scale in (("a", 0.25), ("b", 2.0), ("c", 1.0)):
        stored = tensors[f"blocks.0.{layer}.weight"].float()
        assert torch.equal(values(entries[f"blocks.0.{layer}.weight"]), stored * scale)
    given = entries["blocks.0.a.weight"].given
    assert given.activations == "float8"
    assert given.scale is not None
    assert given.scale.item() == 0.5
    assert entries["blocks.0.b.weight"].given == Input()


def test_fp8_scaled_marker_can_ask_for_full_precision(tmp_path: Path) -> None:
    tensors = {
        "model.diffusion_model.scaled_fp8": torch.zeros(2, dtype=E4M3), "model.diffusion_model.a.weight": fp8(2, 2),
        "model.diffusion_model.a.scale_weight": torch.tensor(1.5),
        "model.diffusion_model.a.scale_input": torch.tensor(3.0),
    }  # fmt: skip
    entry = round_trip(Fp8Scaled(), tensors, tmp_path)["model.diffusion_model.a.weight"]
    assert entry.given.activations == "none"
    assert entry.given.scale is not None


def test_fp8_scaled_without_marker_stays_without(tmp_path: Path) -> None:
    round_trip(Fp8Scaled(), {"a.weight": fp8(2, 4), "a.scale_weight": torch.tensor(1.0)}, tmp_path)


def test_fp8_scaled_refuses_what_its_readers_could_not_do(tmp_path: Path) -> None:
    weight = torch.randn(16, 32)
    assert not Fp8Scaled().accepts(BFL().quantize("b.0.a.weight", weight, "fp8r"))
    made = Fp8Scaled().quantize("b.0.a.weight", weight, "float8_e5m2")
    written(Fp8Scaled(), {"b.0.a.weight": made}, tmp_path / "x.safetensors")
    assert (values(made) - weight).abs().max() < 0.13 * weight.abs().max()


def nvfp4_by_loops(codes: torch.Tensor, blocks: torch.Tensor, whole: float) -> torch.Tensor:
    found = torch.zeros(codes.shape[0], 2 * codes.shape[1])
    for row, column in itertools.product(range(codes.shape[0]), range(2 * codes.shape[1])):
        byte = int(codes[row, column // 2])
        code = byte & 15 if column % 2 == 0 else byte >> 4
        scale = blocks[row, column // 16].float() * torch.tensor(whole)
        found[row, column] = E2M1[code] * scale
    return found


def test_bfl_reads_rows_and_nvfp4(tmp_path: Path) -> None:
    codes = torch.randint(0, 256, (3, 16), dtype=torch.uint8)
    blocks = torch.rand(3, 2).mul(10).to(E4M3)
    tensors = {
        "a.weight": fp8(4, 6), "a.weight_scale": torch.rand(4), "a.bias": torch.randn(4),
        "b.weight": codes, "b.weight_scale": blocks, "b.weight_scale_2": torch.tensor(0.01),
        "b.input_scale": torch.tensor(0.3),
    }  # fmt: skip
    entries = round_trip(BFL(), tensors, tmp_path)
    assert torch.equal(values(entries["a.weight"]), tensors["a.weight"].float() * tensors["a.weight_scale"][:, None])
    assert entries["a.weight"].given.activations == "float8"
    assert torch.equal(values(entries["b.weight"]), nvfp4_by_loops(codes, blocks, 0.01))
    assert entries["b.weight"].given == Input(activations="int8")


def test_modelopt_reads_scalars_and_blocks(tmp_path: Path) -> None:
    tensors = {
        "a.weight": fp8(4, 6), "a.weight_scale": torch.tensor(0.7), "a.input_scale": torch.tensor([0.2]),
        "b.weight": fp8(4, 6), "b.weight_scale": torch.rand(2, 3),
    }  # fmt: skip
    entries = round_trip(ModelOpt(), tensors, tmp_path)
    assert entries["a.weight"].given.activations == "float8"
    stored, scale = tensors["b.weight"].float(), tensors["b.weight_scale"]
    for row, column in itertools.product(range(4), range(6)):
        assert values(entries["b.weight"])[row, column] == stored[row, column] * scale[row // 2, column // 2]
    assert not BFL().recognizes(tmp_path / "source.safetensors")


def test_nvfp4_rounds_like_the_loops_of_its_definition() -> None:
    torch.manual_seed(0)
    weight = torch.randn(4, 32) * 3
    found = quantize_nvfp4(weight)
    whole = float(weight.abs().max() / (448 * 6))
    for row, block in itertools.product(range(4), range(2)):
        part = weight[row, 16 * block : 16 * block + 16]
        scale = (part.abs().max() / 6 / torch.tensor(whole)).to(E4M3).float() * torch.tensor(whole)
        nearest = E2M1[(part[:, None] / scale - E2M1[None]).abs().argmin(1)] * scale
        assert torch.allclose(found.dequantize()[row, 16 * block : 16 * block + 16], nearest, atol=1e-6)


def test_bfl_files_are_what_diffusers_quantizer_makes() -> None:
    weight = torch.randn(32, 64, dtype=torch.bfloat16)
    made = BFL().encode("b.0.a.weight", BFL().quantize("b.0.a.weight", weight, "nvfp4"))
    codes, blocks, whole = bfl_utils.quantize_nvfp4(weight)
    theirs = {"b.0.a.weight": codes, "b.0.a.weight_scale": blocks, "b.0.a.weight_scale_2": whole}
    same_tensors(made, theirs)
    made = BFL().encode("b.0.a.weight", BFL().quantize("b.0.a.weight", weight, "fp8r"))
    codes, rows = bfl_utils.quantize_fp8r(weight)
    same_tensors(made, {"b.0.a.weight": codes, "b.0.a.weight_scale": rows})


def test_e2m1_ties_go_to_even_codes() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -5.0])
    assert E2M1[e2m1_codes(ties).int()].tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -4]


def test_mxfp8_never_overflows_and_uses_powers_of_two() -> None:
    weight = torch.cat([torch.randn(2, 32) * 1e-3, torch.full((1, 32), 448.0), torch.full((1, 32), 449.0)])
    found = quantize_mxfp8(weight)
    scales = found.scale.values()
    assert torch.equal(scales.log2(), scales.log2().round())
    assert scales[2:, 0].tolist() == [1, 2]
    assert (found.dequantize() - weight).abs().max() <= 449 / 16


@pytest.mark.parametrize(
    ("layout", "kind"), [(BFL(), "fp8r"), (BFL(), "nvfp4"), (ModelOpt(), "fp8"), (ModelOpt(), "nvfp4")]
)
def test_what_is_quantized_can_be_written_and_read(tmp_path: Path, layout: BFL | ModelOpt, kind: str) -> None:
    weight = torch.randn(16, 32, dtype=torch.bfloat16)
    entry = layout.quantize("blocks.0.a.weight", weight, kind)
    path = written(
        layout, {"blocks.0.a.weight": entry, "blocks.0.a.bias": Entry(torch.ones(16))}, tmp_path / "x.safetensors"
    )
    with layout.open(path) as reader:
        again = reader.read("blocks.0.a.weight")
        assert isinstance(again.weight, QuantizedWeight)
        assert torch.equal(values(again), values(entry))
        assert (values(again) - weight.float()).norm() < 0.15 * weight.float().norm()
    plain = layout.quantize("norm.weight", torch.ones(16), kind).weight
    assert isinstance(plain, torch.Tensor)
