"""`generate`, `inspect` and `techniques`."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from hasten.cli import common
from hasten.core.registry import techniques
from tests.cli.conftest import Run


def test_generate_writes_a_picture_and_says_what_was_done(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "folder" / "pizza.png"
    options = ("--steps", 4, "-r", "FirstBlockCache(threshold=10.0)", "--out", file)
    result = run("generate", "emoji-flux", "pizza, fluent style", *options)
    assert result.exit_code == 0, result.output
    assert Image.open(file).size == (128, 128)
    assert "FluxPipeline: 1 technique applied" in result.output
    assert "3 of 4 denoiser calls reused" in result.output


def test_generate_takes_a_class_name(run: Run, tmp_path: Path) -> None:
    result = run("generate", "emoji-dit", "Pizza", "--steps", 2, "--out", tmp_path / "p.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("emoji-flux", ("FluxTransformer2DModel", "single_transformer_blocks", "hidden_states (picture)", "no U-Net")),
        ("emoji-sd", ("UNet2DConditionModel", "CrossAttnDownBlock2D", "DeepCache")),
        ("FLUX.1-dev", ("11.90 B", "19 x FluxTransformerBlock", "38 x FluxSingleTransformerBlock")),
    ],
)
def test_inspect_shows_structure_and_what_applies(run: Run, model: str, expected: tuple[str, ...]) -> None:
    result = run("inspect", model)
    assert result.exit_code == 0, result.output
    assert all(text in result.output for text in expected), result.output


def test_inspect_cuts_no_name_off_on_a_narrow_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common.out, "width", 80)
    assert "…" not in run("inspect", "FLUX.1-dev").output


def test_inspect_suggests_neighbours(run: Run) -> None:
    result = run("inspect", "FLUX.1-def")
    assert result.exit_code == 2
    assert "Did you mean FLUX.1-dev" in " ".join(result.output.split())


def test_techniques_lists_all_and_shows_one(run: Run) -> None:
    listing = run("techniques")
    assert all(name in listing.output for name in techniques())
    one = run("techniques", "DeepCache")
    assert "interval" in one.output
    assert "Source:" in one.output
    assert run("techniques", "DeepCash").exit_code == 2
