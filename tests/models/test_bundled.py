"""The bundled models are plain diffusers folders that work without any code of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.models import bundled, load

NAMES = ("emoji-flux", "emoji-sd", "emoji-dit")
MEGABYTE = 1_000_000


def pipeline(name: str, **options: Any) -> Any:
    from diffusers import DiffusionPipeline

    loaded = DiffusionPipeline.from_pretrained(bundled()[name], **options)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_all_three_are_there() -> None:
    assert sorted(bundled()) == sorted(NAMES)


def test_they_are_small() -> None:
    files = [file for folder in bundled().values() for file in folder.rglob("*") if file.is_file()]
    assert sum(file.lstat().st_size for file in files) <= 20 * MEGABYTE, "the autoencoder is kept once"
    assert max(file.stat().st_size for file in files) <= 16 * 2**20


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_plain_diffusers_loads_and_draws(name: str, dtype: torch.dtype | None) -> None:
    pipe = pipeline(name) if dtype is None else pipeline(name, torch_dtype=dtype)
    call: dict[str, Any] = {"num_inference_steps": 1, "output_type": "np"}
    if name == "emoji-dit":
        call["class_labels"] = pipe.get_label_ids([next(iter(pipe.labels))])
    else:
        call |= {"prompt": "pizza, fluent style", "width": 128, "height": 128}
    image = pipe(**call).images[0]
    assert image.shape == (128, 128, 3)
    assert np.isfinite(image).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_default_workload_draws_something_on_white(name: str) -> None:
    from hasten.measure.rendering import render

    model = load(name)
    pixels = np.asarray(render(model.pipeline, model.workload.replace(steps=12), model.workload.prompts[0], 0))
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean() > 200, "emoji stand on white"
    assert pixels.std() > 20, "and there is something on it"


@pytest.mark.parametrize("name", NAMES)
def test_it_carries_card_workload_and_notices(name: str) -> None:
    folder = bundled()[name]
    card = (folder / "README.md").read_text("utf-8").casefold()
    assert all(word in card for word in ("licence", "training", "failure", "samples.webp", "mb in float16"))
    assert (folder / "samples.webp").is_file()
    assert len(load_json(folder / "workload.json")["prompts"]) >= 3


def test_text_encoders_stay_in_single_precision_by_default() -> None:
    for file in (file for folder in bundled().values() for file in folder.glob("text_encoder*/config.json")):
        assert load_json(file)["dtype"] == "float32"


def test_the_class_table_is_counted_and_named() -> None:
    transformer = load_json(bundled()["emoji-dit"] / "transformer" / "config.json")
    assert transformer["num_embeds_ada_norm"] == 1000
    assert transformer["out_channels"] == transformer["in_channels"]
    assert load_json(bundled()["emoji-dit"] / "model_index.json")["id2label"]


def test_flux_is_what_the_pipeline_needs() -> None:
    folder = bundled()["emoji-flux"]
    transformer, vae = load_json(folder / "transformer" / "config.json"), load_json(folder / "vae" / "config.json")
    assert transformer["guidance_embeds"]
    assert transformer["num_layers"] >= 3
    assert transformer["num_single_layers"] >= 6
    assert isinstance(vae["shift_factor"], float)


def load_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text("utf-8"))
