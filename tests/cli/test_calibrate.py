"""`hasten calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hasten.cli import calibrate as command
from hasten.search import calibrate_signals
from tests.cli.conftest import Run

FEW = ("--pictures", 1, "--steps", 8)


@pytest.mark.parametrize(("purpose", "use"), [("teacache", "TeaCache(coefficients="), ("magcache", "MagCache(ratios=")])
def test_it_writes_a_file_and_says_how_to_use_it(run: Run, tmp_path: Path, purpose: str, use: str) -> None:
    file = tmp_path / "folder" / "own.json"
    result = run("calibrate", "emoji-dit", "--for", purpose, "-o", file, *FEW)
    assert result.exit_code == 0, result.output
    assert use in result.output
    assert str(file) in result.output
    recipe = f'{use}"{file}"{", threshold=9.0" if purpose == "teacache" else ""})'
    picture = run("generate", "emoji-dit", "pizza", "--steps", 8, "-r", recipe, "--out", tmp_path / "pizza.png")
    assert picture.exit_code == 0, picture.output
    assert "of 8 denoiser calls reused" in picture.output


def test_a_poor_fit_is_warned_of(run: Run, tmp_path: Path) -> None:
    result = run("calibrate", "emoji-dit", "--for", "teacache", "-o", tmp_path / "own.json", "--pictures", 2)
    assert "R^2 = " in result.output
    assert "Warning: the polynomial explains little" in result.output


def test_an_unknown_purpose_is_told_the_known_ones(run: Run, tmp_path: Path) -> None:
    result = run("calibrate", "emoji-dit", "--for", "teacash", "-o", tmp_path / "own.json")
    assert result.exit_code == 2
    assert "Did you mean teacache" in " ".join(result.output.split())


def test_an_interrupted_calibration_leaves_no_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setitem(command.PURPOSES, "teacache", interrupted)
    result = run("calibrate", "emoji-dit", "--for", "teacache", "-o", tmp_path / "own.json")
    assert result.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_kind_stops_before_the_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.json"
    file.write_text('{"kind": "plan"}')
    monkeypatch.setattr(calibrate_signals, "calibrate", None)
    result = run("calibrate", "emoji-dit", "--for", "magcache", "-o", file, *FEW)
    assert result.exit_code == 2, result.output
    assert "holds no magnitude ratios" in " ".join(result.output.split())
    assert file.read_text() == '{"kind": "plan"}'
