"""`hasten plan`, and what `generate` says about memory and predictions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.cli.plan import parse_bytes
from hasten.core.errors import HastenError
from hasten.measure import rendering
from hasten.search import fallback
from hasten.search.prediction import here
from tests.cli.conftest import Run
from tests.search.prediction.stand_ins import DEVICE, LADDER


def text(result: Any) -> str:
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.mark.parametrize(
    ("given", "expected"), [("12GB", 12 * 10**9), ("11.5 GiB", int(11.5 * 2**30)), ("512M", 512 * 10**6), ("7", 7)]
)
def test_sizes_are_read(given: str, expected: int) -> None:
    assert parse_bytes(given) == expected


@pytest.mark.parametrize("given", ["12XB", "", "-3GB", "0GB", "GB", "1I"])
def test_what_is_no_size_is_said(given: str) -> None:
    with pytest.raises(HastenError, match="no size of memory"):
        parse_bytes(given)


def test_flux_is_planned_before_anything_is_loaded(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.safe_open", refuse)
    result = run("plan", "FLUX.1-dev", "--device", "h200", "--steps", 4)
    assert result.exit_code == 0, result.output
    words = text(result)
    assert "FLUX.1-dev, 1024x1024, 4 steps, bfloat16, on NVIDIA H200 (measured)" in words
    assert "22.17 GiB" in words
    assert "Pick: " in words


def test_too_little_memory_says_how_much_is_needed(run: Run) -> None:
    words = text(run("plan", "emoji-flux", "--device", "cpu", "--memory", "1MB"))
    assert "Nothing fits; the least that any of these recipes needs is" in words


def test_size_and_all_rows(run: Run) -> None:
    words = text(run("plan", "emoji-sd", "--device", "h200", "--size", "64x128", "--all"))
    assert "emoji-sd, 64x128" in words
    assert "DeepCache(interval=2)" in words
    words = text(run("plan", "emoji-flux", "--device", "h200", "--all"))
    assert "refused" in words


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("FLUX.1-dew",), "FLUX.1-dev"),
        (("emoji-flux", "--memory", "lots"), "no size of memory"),
        (("emoji-flux", "--device", "h20"), "h200"),
        (("emoji-flux", "--size", "big"), "no size"),
        (("emoji-flux", "--steps", "0"), "steps must be"),
    ],
)
def test_wrong_input_is_one_sentence(run: Run, arguments: tuple[str, ...], expected: str) -> None:
    result = run("plan", *arguments)
    assert result.exit_code == 2
    assert expected in text(result)


def test_generate_names_the_next_recipe_or_takes_it(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    plain = rendering.render

    def render(pipeline: Any, *rest: Any) -> Any:
        if not getattr(pipeline.transformer, "has_Streamed", False):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(pipeline, *rest)

    monkeypatch.setattr(rendering, "render", render)
    monkeypatch.setattr(fallback, "ladder", lambda: LADDER)
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path))
    arguments = ("generate", "emoji-flux", "pizza", "--steps", 2, "--out", tmp_path / "a.png")
    refused = run(*arguments)
    assert refused.exit_code == 2
    assert 'Next to try: -r "Streamed()"' in text(refused)
    assert not (tmp_path / "a.png").exists()
    made = run(*arguments, "--fallback")
    assert made.exit_code == 0, made.output
    assert "Out of memory; went on with Streamed()" in text(made)
    assert (tmp_path / "a.png").exists()


def test_a_run_on_a_known_device_shows_predicted_against_actual(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path))
    file = here._file(torch.device("cpu"))
    file.parent.mkdir(parents=True)
    file.write_text(here.json_text(dataclasses.asdict(DEVICE)))
    words = text(run("generate", "emoji-flux", "pizza", "--steps", 2, "--out", tmp_path / "a.png"))
    assert "denoising step:" in words
    assert "ms predicted" in words
    folder = tmp_path / "report"
    words = text(
        run("compare", "emoji-dit", "-r", "FORA(interval=2)", "--steps", 2, "--prompt", "pizza", "--out", folder)
    )
    assert "Predicted against actual" in words
    assert "plain: a picture:" in words
    assert "FORA(interval=2): denoising step:" in words
