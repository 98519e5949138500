"""`hasten quantize`, and the statistics that it and other commands gather."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hasten.cli import quantize as command
from hasten.cli.quantize import method_recipe
from hasten.core.errors import InvalidSetting, UnknownName
from hasten.kernels.modules import Quantized
from hasten.quantize import GPTQ, Int8Linear
from tests.cli.conftest import Run

FEW = ("--pictures", 1, "--steps", 2)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been saved; saving has tests of its own."""
    found: list[Any] = []

    def save(pipeline: Any, folder: Path) -> Path:
        found.append(pipeline)
        return folder

    monkeypatch.setattr(command, "saver", lambda: save)
    return found


def words(output: str) -> str:
    return " ".join(output.split())


def test_a_method_that_passes_is_saved_and_reported(run: Run, tmp_path: Path, saved: list[Any]) -> None:
    report = tmp_path / "report.json"
    result = run(
        "quantize", "emoji-dit", "--method", "int8", "--gate-psnr", 20, "-o", tmp_path / "out", "--report", report, *FEW
    )
    assert result.exit_code == 0, result.output
    assert "passed" in result.output
    layers = [module for module in saved[0].transformer.modules() if isinstance(module, Quantized)]
    assert len(layers) > 50
    told = json.loads(report.read_text())
    assert told["passed"] is True
    assert told["rounds"][0]["fidelity"]["psnr"] > 20
    assert told["rounds"][0]["layers"] == len(layers)


def test_what_fails_is_not_saved(run: Run, tmp_path: Path, saved: list[Any]) -> None:
    result = run(
        "quantize", "emoji-dit", "--method", "weightonly", "--bits", 2, "--gate-psnr", 60, "--back-off", 0,
        "-o", tmp_path / "out", *FEW,
    )  # fmt: skip
    assert result.exit_code == 2
    assert "The gate is not passed (PSNR" in words(result.output)
    assert saved == []
    assert not (tmp_path / "out").exists()


def test_statistics_are_gathered_once_when_a_recipe_needs_them(
    run: Run, tmp_path: Path, own_cache: Path, saved: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hasten.search.quantization import collect as module

    monkeypatch.setattr(module, "PICTURES", 1)
    arguments = ("quantize", "emoji-dit", "--method", "gptq", "--bits", 4, "--no-gate", "-o", tmp_path / "out")
    first = run(*arguments)
    assert first.exit_code == 0, first.output
    assert "Watching a few pictures first" in first.output
    assert len(list((own_cache / "statistics").iterdir())) == 1
    picture = run("generate", "emoji-dit", "pizza", "--steps", 2, "-r", "AWQ(grid=2)", "--out", tmp_path / "a.png")
    assert picture.exit_code == 0, picture.output
    assert "Watching" not in picture.output
    assert "engaged" in picture.output
    assert len(saved) == 1


def test_calibrate_writes_statistics_where_it_is_told(run: Run, tmp_path: Path, own_cache: Path) -> None:
    file = tmp_path / "s.safetensors"
    result = run("calibrate", "emoji-dit", "--for", "statistics", "-o", file, *FEW)
    assert result.exit_code == 0, result.output
    assert file.is_file()
    assert not own_cache.exists()
    recipe = f'GPTQ(statistics="{file}")'
    picture = run("generate", "emoji-dit", "pizza", "--steps", 2, "-r", recipe, "--out", tmp_path / "a.png")
    assert picture.exit_code == 0, picture.output
    other = run("generate", "emoji-flux", "pizza", "--steps", 2, "-r", recipe, "--out", tmp_path / "b.png")
    assert other.exit_code == 2
    assert "holds statistics of other weights; run `hasten calibrate MODEL --for statistics`" in words(other.output)


def test_plans_need_a_file(run: Run) -> None:
    result = run("calibrate", "emoji-dit")
    assert result.exit_code == 2
    assert "Say with -o FILE" in words(result.output)


def test_methods_by_name() -> None:
    assert method_recipe("GPTQ", 3).techniques == (GPTQ(bits=3),)
    assert method_recipe("int8", None).techniques == (Int8Linear(),)
    with pytest.raises(UnknownName, match="svdquant"):
        method_recipe("svdquan", None)
    with pytest.raises(InvalidSetting, match="has no choice of bits"):
        method_recipe("int8", 4)
