"""The memory benchmark runs small on the CPU: rows are written one by one, and what fails or has no time is a row."""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "benchmarks" / "memory" / "run.py"
RECIPES = ("", "ModulationTable()", "OneAtATime({})", "Offload(kind='blocks', {})", "Offload(device='cuda:77')")


@pytest.fixture(scope="module")
def script() -> Any:
    found = importlib.util.spec_from_file_location("memory_benchmark", FILE)
    assert found
    assert found.loader
    module = importlib.util.module_from_spec(found)
    with pytest.MonkeyPatch.context() as patched:  # dataclasses look their module up
        patched.setitem(__import__("sys").modules, found.name, module)
        found.loader.exec_module(module)
        yield module


def bench(script: Any, seconds: float) -> Any:
    return script.Bench(torch.device("cpu"), True, time.monotonic() + seconds)


def test_rows(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write = script.atomic_write_text

    def counting(path: Path, text: str) -> None:
        write(path, text)
        written.append(len(json.loads(path.read_text("utf-8"))["rows"]))

    monkeypatch.setattr(script, "atomic_write_text", counting)
    rows = script.run(bench(script, 600), ["FLUX.1-dev"], tmp_path / "out.json", RECIPES)
    assert written == [1, 2, 3, 4, 5]
    plain, table, turns, blocks, refused = rows
    assert (plain["distance"], plain["bytes_moved_per_image"]) == (0, 0)
    assert 0 < table["distance"] < 1e-5
    assert turns["distance"] == blocks["distance"] == 0
    pipe = script.Pipeline(bench(script, 600), "FLUX.1-dev")
    size = {name: sum(p.nbytes for p in pipe.components[name].parameters()) for name in ("transformer", "vae")}
    assert turns["bytes_moved_per_image"] == sum(size.values())
    inside = sum(p.nbytes for name, p in pipe.denoiser.named_parameters() if "transformer_blocks" in name)
    assert blocks["bytes_moved_per_image"] == sum(size.values()) + (script.STEPS - 1) * inside
    linears = sum(p.nbytes for n, p in pipe.denoiser.named_parameters() if "norm" in n and ".linear." in n)
    assert table["bytes_moved_per_image"] == linears, "a new pooled text for each image"
    assert "there is no device cuda:77" in refused["refused"]
    assert all(row["step_ms"] > 0 for row in rows[:4])


def test_what_has_no_time_is_listed(script: Any, tmp_path: Path) -> None:
    rows = script.run(bench(script, -1), ["FLUX.1-dev", "Z-Image-Turbo"], tmp_path / "out.json")
    assert [row["left_out"] for row in rows] == ["no time was left"] * 2 * len(script.RECIPES)
    assert len(json.loads((tmp_path / "out.json").read_text("utf-8"))["rows"]) == len(rows)


def test_a_recipe_that_fails_is_a_row(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = script.Pipeline(bench(script, 600), "FLUX.1-dev")
    monkeypatch.setattr(pipe, "image", lambda *_: 1 / 0)  # pyright: ignore[reportUnknownLambdaType]
    row, output = script.measure(pipe, "ModulationTable()", None)
    assert row == {"failed": "ZeroDivisionError: division by zero"}
    assert output is None
