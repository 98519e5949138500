"""Planned models: exact weights, nothing loaded, errors in words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import hasten
from hasten.core.errors import HastenError, UnknownName
from hasten.core.target import released_models
from hasten.models import bundled, load
from hasten.search.prediction.model import planned_from, planned_model
from hasten.search.prediction.networks import build, meta_copy, weight_bytes

PUBLISHED = {
    "FLUX.1-dev": {
        "transformer": 11_901_408_320,
        "text_encoder_2": 4_762_310_656,
        "text_encoder": 123_060_480,
        "vae": 83_819_683,
    },
    "stable-diffusion-xl-base-1.0": {
        "unet": 2_567_463_684,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
        "vae": 83_653_863,
    },
    "Z-Image-Turbo": {"text_encoder": 4_022_468_096, "vae": 83_819_683},
}
"""Parameters of the released models' files."""


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_weights_are_those_of_the_release(name: str) -> None:
    sizes = planned_model(name).weights
    assert {part: sizes[part] for part in PUBLISHED[name]} == {part: 2 * n for part, n in PUBLISHED[name].items()}


@pytest.mark.parametrize("name", sorted(released_models()))
def test_every_release_is_planned_with_all_its_parts(name: str) -> None:
    model = planned_model(name)
    assert "vae" in model.weights
    assert bool(model.encoders) == (not name.startswith("DiT"))
    assert all(weight.is_meta for module in model.target.modules.values() for weight in module.parameters())
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", sorted(bundled()))
def test_a_folder_plans_what_loading_gives(name: str) -> None:
    pipeline = load(name, device="cpu", dtype="bfloat16").pipeline
    live = {part: weight_bytes(module) for part, module in hasten.Target.of(pipeline).modules.items()}
    assert planned_model(name).weights == live
    assert planned_from(pipeline).weights == live


def test_configurations_are_enough(tmp_path: Path) -> None:
    folder = tmp_path / "configurations"
    shutil.copytree(bundled()["emoji-flux"], folder, ignore=shutil.ignore_patterns("*.safetensors", "*.png"))
    assert planned_model(str(folder)).weights == planned_model("emoji-flux").weights


def test_an_owner_may_stand_before_the_name() -> None:
    assert planned_model("black-forest-labs/FLUX.1-dev").name == "FLUX.1-dev"


def test_unknown_names_and_broken_configurations_are_said(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"FLUX\.1-dev"):
        planned_model("FLUX.1-dew")
    folder = tmp_path / "broken"
    shutil.copytree(bundled()["emoji-dit"], folder)
    (folder / "transformer" / "config.json").write_text(json.dumps({"num_layers": "many"}))
    with pytest.raises(HastenError, match="DiTTransformer2DModel cannot be used"):
        planned_model(str(folder))
    with pytest.raises(HastenError, match="no class FluxTransfomer"):
        build("diffusers", "FluxTransfomer", {}, torch.bfloat16)


def test_weights_that_stay_in_float32_count_as_such() -> None:
    transformer = planned_model("Wan2.1-T2V-1.3B").target.denoisers[0].module
    kinds = {name: weight.dtype for name, weight in transformer.named_parameters()}
    assert kinds["condition_embedder.time_embedder.linear_1.weight"] == torch.float32
    assert kinds["blocks.0.attn1.to_q.weight"] == torch.bfloat16


def test_a_copy_of_a_live_network_has_no_values_and_no_interceptions() -> None:
    pipeline = load("emoji-dit", device="cpu").pipeline
    with hasten.accelerate(pipeline, "FORA(interval=2)"):
        copy = meta_copy(pipeline.transformer)
        assert type(copy) is not type(pipeline.transformer)
    assert type(copy) is type(pipeline.transformer)
    assert all(weight.is_meta for weight in (*copy.parameters(), *copy.buffers()))
    assert {n: w.shape for n, w in copy.named_parameters()} == {
        n: w.shape for n, w in pipeline.transformer.named_parameters()
    }
    assert not any(weight.is_meta for weight in pipeline.transformer.parameters())


def test_two_denoisers_are_both_planned() -> None:
    assert {"transformer", "transformer_2"} <= set(planned_model("Wan2.2-T2V-A14B").weights)
