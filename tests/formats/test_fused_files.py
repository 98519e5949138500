"""Files whose layers are fused otherwise than those of diffusers: loaded, each layer computes what it did."""

from __future__ import annotations

from pathlib import Path

import torch

import hasten
from hasten.formats.components import entries
from hasten.formats.format import Entry
from hasten.formats.keys import in_scheme
from hasten.formats.opening import format_named
from hasten.formats.recoding import effective
from hasten.formats.tensors import is_linear
from hasten.kernels.modules import Input, LowRank, Quantized
from hasten.kernels.rounding import quantize_integer
from tests.formats.held import Held


def svdquant(weight: torch.Tensor) -> Entry:
    """Codes of 4 bits for a smoothed input, with a side branch of 16 ranks."""
    generator = torch.Generator().manual_seed(0)
    rows, columns = weight.shape
    smooth = (torch.rand(columns, generator=generator) + 0.5).bfloat16()
    down, up = (torch.randn(*shape, generator=generator).bfloat16() / 99 for shape in ((16, columns), (rows, 16)))
    codes = quantize_integer(weight * smooth.float(), 4, 64, scales=torch.bfloat16)
    return Entry(codes, Input(smooth=smooth, activations="int8"), LowRank(down, up))


def test_nunchakus_flux_with_fused_projections_and_halved_last_layers(tmp_path: Path) -> None:
    model = hasten.load("emoji-flux", device="cpu").pipeline.transformer
    made: dict[str, Entry] = {}
    for name, entry in entries(model):
        weight = entry.weight
        assert isinstance(weight, torch.Tensor)
        coded = is_linear(name, weight) and "norm" not in name
        made[name] = svdquant(weight) if coded else Entry(weight.bfloat16())
    fused = in_scheme(Held(made), "nunchaku")
    writer = format_named("nunchaku").create(tmp_path / "a.safetensors", fused.names(), {})
    for name in fused.names():
        writer.add(name, fused.read(name))
    writer.finish()
    loaded = hasten.load(tmp_path / "a.safetensors", base="emoji-flux", device="cpu", dtype="bfloat16").pipeline
    layers = {
        f"{name}.weight": layer for name, layer in loaded.transformer.named_modules() if isinstance(layer, Quantized)
    }
    assert layers.keys() == {name for name, entry in made.items() if not isinstance(entry.weight, torch.Tensor)}
    assert any(name.endswith("proj_out.weight") for name in layers)
    for name, layer in layers.items():
        wanted = effective(made[name])
        assert (layer.effective() - wanted).abs().max() < 1e-6
