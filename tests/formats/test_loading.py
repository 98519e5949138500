"""Saving and loading of pipelines with quantized layers, and files of weights put into a pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hasten
from hasten.core.errors import HastenError, UnknownName
from hasten.core.registry import specs
from hasten.formats.components import empty, entries, fill
from hasten.formats.format import Entry
from hasten.formats.keys import in_scheme
from hasten.formats.opening import format_named
from hasten.formats.saving import is_quantized
from hasten.kernels.modules import Quantized, QuantizedLinear
from hasten.kernels.rounding import quantize_integer
from hasten.measure.rendering import render
from hasten.models import bundled
from tests.formats.held import Held


def picture(pipeline: Any, workload: hasten.Workload) -> np.ndarray:
    return np.asarray(render(pipeline, workload.replace(steps=2), workload.prompts[0], 0))


@pytest.mark.parametrize(
    ("model", "technique"),
    [
        ("emoji-flux", hasten.Int8Linear(originals="drop", components=("transformer", "text_encoder*"))),
        ("emoji-sd", hasten.WeightOnly(bits=3, originals="drop")),
    ],
)
def test_a_saved_pipeline_makes_the_same_pictures(model: str, technique: hasten.Technique, tmp_path: Path) -> None:
    loaded = hasten.load(model, device="cpu")
    hasten.apply_permanently(loaded.pipeline, technique)
    folder = hasten.save(loaded.pipeline, tmp_path / "saved")
    again = hasten.load(str(folder), device="cpu")
    assert again.workload == loaded.workload
    assert np.array_equal(picture(again.pipeline, again.workload), picture(loaded.pipeline, loaded.workload))
    for name, part in loaded.pipeline.components.items():
        if isinstance(part, nn.Module):
            other = again.pipeline.components[name]
            assert is_quantized(other) == is_quantized(part)
            state = other.state_dict()
            assert all(torch.equal(tensor, state[key]) for key, tensor in part.state_dict().items())
    assert not list(tmp_path.glob(".*"))


def test_a_saved_pipeline_takes_less_space_and_says_what_it_is(tmp_path: Path) -> None:
    loaded = hasten.load("emoji-dit", device="cpu", dtype="bfloat16")
    hasten.apply_permanently(loaded.pipeline, hasten.WeightOnly(bits=4, originals="drop"))
    hasten.save(loaded.pipeline, tmp_path / "a")
    hasten.save(loaded.pipeline, tmp_path / "a")
    config = json.loads((tmp_path / "a" / "transformer" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hasten"
    files = [
        folder / "transformer" / "diffusion_pytorch_model.safetensors"
        for folder in (tmp_path / "a", bundled()["emoji-dit"])
    ]
    assert files[0].stat().st_size < 0.6 * files[1].stat().st_size
    again = hasten.load(str(tmp_path / "a"), device="cpu")
    assert again.pipeline.labels == loaded.pipeline.labels != {}
    weights = [tensor.dtype for tensor in again.pipeline.transformer.parameters()]
    assert set(weights) == {torch.bfloat16}
    assert all(m.dtype == torch.bfloat16 for m in again.pipeline.transformer.modules() if isinstance(m, Quantized))
    wide = hasten.load(str(tmp_path / "a"), device="cpu", dtype="float32").pipeline.transformer
    assert {tensor.dtype for tensor in wide.parameters()} == {torch.float32}


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match="not int"):
        hasten.save(3, tmp_path / "x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("dear diary")
    transformer = hasten.load("emoji-dit", device="cpu").pipeline.transformer
    with pytest.raises(HastenError, match="files that are no model"):
        hasten.save(transformer, tmp_path / "mine")
    assert (tmp_path / "mine" / "diary.txt").exists()
    transformer.extra = nn.Linear(2, 2)
    with pytest.raises(HastenError, match=r"cannot be saved: it has 'extra.bias'"):
        hasten.save(transformer, tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]


def written(path: Path, names: str, kind: str) -> tuple[Path, dict[str, Entry]]:
    """The bundled FLUX as a file of some format, with what it was made of under diffusers' names."""
    model = hasten.load("emoji-flux", device="cpu").pipeline.transformer
    layout = format_named("gguf" if path.suffix == ".gguf" else "hasten")
    held = in_scheme(Held(dict(entries(model))), names)
    writer = layout.create(path, held.names(), {"general.architecture": "flux"})
    made: dict[str, Entry] = {}
    for name in held.names():
        weight = held.read(name).weight
        assert isinstance(weight, torch.Tensor)
        made[name] = layout.quantize(name, weight, kind)
        writer.add(name, made[name])
    writer.finish()
    renamed = in_scheme(Held(made), "diffusers")
    return path, {name: renamed.read(name) for name in renamed.names()}


@pytest.mark.parametrize(
    ("file", "names", "kind"), [("a.gguf", "original", "Q8_0"), ("a.safetensors", "diffusers", "int4")]
)
def test_a_file_goes_into_a_pipeline_in_the_codes_it_has(file: str, names: str, kind: str, tmp_path: Path) -> None:
    path, made = written(tmp_path / file, names, kind)
    loaded = hasten.load(path, base="emoji-flux", device="cpu")
    transformer = loaded.pipeline.transformer
    coded = {name for name, entry in made.items() if not isinstance(entry.weight, torch.Tensor)}
    found = {f"{name}.weight": layer for name, layer in transformer.named_modules() if isinstance(layer, Quantized)}
    assert len(coded) > 50
    assert found.keys() == coded
    for name, layer in found.items():
        weight = made[name].weight
        assert not isinstance(weight, torch.Tensor)
        assert all(torch.equal(tensor, weight.tensors()[key]) for key, tensor in layer.quantized.tensors().items())
    plain = hasten.load("emoji-flux", device="cpu")
    one, other = (picture(item.pipeline, plain.workload).astype(float) for item in (loaded, plain))
    assert 0 < np.abs(one - other).mean() < 20


def test_the_network_need_not_be_in_the_base_if_it_was_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = written(tmp_path / "a.safetensors", "diffusers", "int8")
    base = tmp_path / "base"
    shutil.copytree(bundled()["emoji-flux"], base)
    config = json.loads((base / "transformer" / "config.json").read_text())
    shutil.rmtree(base / "transformer")
    with pytest.raises(HastenError, match=r"no released model that is known .*FLUX.1-dev"):
        hasten.load(path, base=base, device="cpu")
    known = specs()["flux"].released
    monkeypatch.setitem(
        known, "tiny", type(known["FLUX.1-dev"])(config=config, width=8, height=8, steps=1, text_tokens=1)
    )  # pyright: ignore
    assert is_quantized(hasten.load(path, base=base, device="cpu").pipeline.transformer)


def test_files_that_go_nowhere(tmp_path: Path) -> None:
    path, _ = written(tmp_path / "a.safetensors", "diffusers", "int8")
    with pytest.raises(HastenError, match="say base="):
        hasten.load(path)
    with pytest.raises(HastenError, match="weights of flux, and emoji-sd has no FluxTransformer2DModel"):
        hasten.load(path, base="emoji-sd")
    with pytest.raises(UnknownName, match="Did you mean transformer"):
        hasten.load(path, base="emoji-flux", component="transfomer")
    with pytest.raises(HastenError, match="base= is for a file"):
        hasten.load("emoji-sd", base="emoji-flux")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises(HastenError, match="of no format that hasten reads"):
        hasten.load(tmp_path / "text.txt", base="emoji-flux")


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.Conv2d(16, 8, 1, bias=False), nn.Embedding(16, 32))


def filled(**changes: Entry | None) -> nn.Module:
    given: dict[str, Entry] = {name: Entry(tensor) for name, tensor in small().state_dict().items()}
    given |= {name.replace("_", "."): entry for name, entry in changes.items() if entry is not None}
    for name, entry in changes.items():
        if entry is None:
            del given[name.replace("_", ".")]
    model = empty(small)
    fill(model, Held(given), torch.bfloat16)
    return model


def test_codes_go_where_they_can_be_used_and_are_decoded_elsewhere() -> None:
    linear, table = (quantize_integer(torch.randn(n, k), 8) for n, k in ((8, 16), (16, 32)))
    model = filled(**{"0_weight": Entry(linear), "1_weight": Entry(linear), "2_weight": Entry(table)})
    assert isinstance(model[0], QuantizedLinear)  # pyright: ignore
    assert model.get_submodule("0").bias.dtype == torch.bfloat16
    convolution = model.get_submodule("1")
    assert convolution(torch.randn(1, 16, 2, 2).bfloat16()).shape == (1, 8, 2, 2)
    assert isinstance(convolution, Quantized)
    assert torch.equal(model.get_submodule("2").weight, table.dequantize(torch.bfloat16))  # pyright: ignore


def test_weights_that_do_not_fit() -> None:
    with pytest.raises(HastenError, match=r"lacks '0.bias'. Available: 0.weight"):
        filled(**{"0_bias": None})
    with pytest.raises(HastenError, match=r"holds '0.weigth', which the network does not have. Did you mean 0.weight"):
        filled(**{"0_weigth": Entry(torch.ones(1))})
    with pytest.raises(HastenError, match=r"'0.weight' has shape \[8, 8\] in the file, and \[8, 16\]"):
        filled(**{"0_weight": Entry(torch.ones(8, 8))})
