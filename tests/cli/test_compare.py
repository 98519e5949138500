"""The main job, end to end on a bundled model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from hasten.measure import compare as compare_module
from hasten.measure import runner
from hasten.measure.comparison import Comparison
from tests.cli.conftest import Run

pytestmark = pytest.mark.xdist_group("compare")  # set up once, not once in each process

QUICK = ("emoji-flux", "--steps", 6, "--prompt", "pizza, fluent style", "--prompt", "tiger face, noto style")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from typer.testing import CliRunner

    from hasten.cli import app

    folder = tmp_path_factory.mktemp("a folder with spaces") / "report"
    recipes = ("AttentionBackend()", "FirstBlockCache(threshold=10.0)", "DeepCache()", "ChannelsLast()")
    flags = [flag for recipe in recipes for flag in ("-r", recipe)]
    result = CliRunner().invoke(app, ["compare", *map(str, QUICK), *flags, "--out", str(folder)])
    assert result.exit_code == 0, result.output
    assert "report.html" in result.output
    return folder


@pytest.fixture(scope="module")
def rows(report: Path) -> dict[str, Any]:
    return {row["name"]: row for row in json.loads((report / "comparison.json").read_text())["rows"]}


def test_the_baseline_comes_first_and_every_recipe_has_a_row(rows: dict[str, Any]) -> None:
    names = list(rows)
    assert names[:5] == [
        "plain",
        "AttentionBackend()",
        "FirstBlockCache(threshold=10.0)",
        "DeepCache()",
        "ChannelsLast()",
    ]
    assert rows["plain"]["speedup"] == 1
    assert rows["plain"]["fidelity"] is None


def test_pictures_are_there_and_are_what_the_numbers_say(rows: dict[str, Any], report: Path) -> None:
    from hasten.measure.quality import mean_fidelity

    def pictures(name: str) -> list[Image.Image]:
        return [Image.open(report / path) for path in rows[name]["images"]]

    assert [image.size for image in pictures("plain")] == [(128, 128), (128, 128)]
    cached = "FirstBlockCache(threshold=10.0)"
    measured = mean_fidelity(pictures(cached), pictures("plain"))
    assert math.isclose(measured.psnr, rows[cached]["fidelity"]["psnr"], rel_tol=1e-6)
    floor = rows["AttentionBackend()"]["noise_floor"]
    assert floor["identical"] or rows[cached]["fidelity"]["psnr"] < floor["psnr"]


def test_a_cache_reuses_steps_and_saves_time(rows: dict[str, Any]) -> None:
    row = rows["FirstBlockCache(threshold=10.0)"]
    assert row["steps"] == {"full": 1, "reused": 5}
    assert list(row["step_map"].values()) == [[True, False, False, False, False, False]]
    assert row["phases"]["denoise"] < rows["plain"]["phases"]["denoise"]
    assert "reused" in row["engaged"][0]


def test_a_refused_recipe_says_why_and_the_others_still_run(rows: dict[str, Any]) -> None:
    assert rows["DeepCache()"]["status"] == "refused"
    assert "no U-Net" in rows["DeepCache()"]["reason"]
    assert rows["ChannelsLast()"]["status"] == "ok"


def test_fewer_steps_at_the_same_time_is_a_row(rows: dict[str, Any]) -> None:
    fewer = [row for row in rows.values() if row["kind"] == "fewer_steps"]
    if rows["FirstBlockCache(threshold=10.0)"]["speedup"] < 1.3:
        pytest.skip("other programs took so much of this machine that reusing five of six steps saved no time")
    assert fewer
    assert all(row["steps"]["full"] < 6 for row in fewer)


def test_a_better_solver_takes_as_many_steps(rows: dict[str, Any]) -> None:
    counts = {
        kind: [row["steps"] for row in rows.values() if row["kind"] == kind] for kind in ("fewer_steps", "other_solver")
    }
    assert counts["other_solver"] == counts["fewer_steps"]
    for plain, solver in zip(*([r for r in rows.values() if r["kind"] == kind] for kind in counts), strict=True):
        assert plain["fidelity"] != solver["fidelity"]


def test_numbers_make_sense(rows: dict[str, Any]) -> None:
    for row in rows.values():
        if row["status"] == "ok":
            times, phases = row["seconds_per_image"], row["phases"]
            assert times["min"] <= times["median"] <= times["max"]
            assert len(times["runs"]) == 2
            assert 0 < sum(phases.values()) <= times["max"] * 1.05
            assert phases["denoise"] > 0
            assert phases["vae"] > 0
            assert row["peak_memory_bytes"] > 10_000_000


def test_the_files_load_again(report: Path) -> None:
    loaded = Comparison.load(report)
    assert not loaded.incomplete
    assert loaded.workload.dtype == "float32"
    html = (report / "report.html").read_text()
    assert html.count("data:image") >= 8
    assert not list(report.rglob("*.tmp"))


def test_ctrl_c_keeps_what_is_finished(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = runner.render, []

    def render(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(runner, "render", render)
    monkeypatch.setattr(compare_module, "_measure_floor", lambda job: None)
    result = run("compare", *QUICK, "--steps", 2, "-r", "AttentionBackend()", "-r", "FORA()", "--out", tmp_path)
    assert result.exit_code == 130
    loaded = Comparison.load(tmp_path)
    assert loaded.incomplete
    assert [row.status for row in loaded.rows] == ["ok", "ok", "interrupted"] or len(loaded.rows) == 2
    assert "incomplete" in (tmp_path / "report.html").read_text().lower()


def test_nan_is_a_failed_row_and_for_the_baseline_an_error(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import AutoencoderKL

    real, calls = AutoencoderKL.decode, []
    arguments = ("compare", *QUICK[:-2], "--steps", 2, "-r", "AttentionBackend()", "--out", tmp_path)

    def broken_after(first: int) -> Any:
        def decode(self: Any, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            scale = float("nan") if len(calls) > first else 1
            return real(self, latents * scale, *args, **kwargs)  # pyright: ignore[reportArgumentType]

        return decode

    monkeypatch.setattr(compare_module, "_measure_floor", lambda job: None)
    monkeypatch.setattr(AutoencoderKL, "decode", broken_after(2))
    assert run(*arguments).exit_code == 0
    assert [row.status for row in Comparison.load(tmp_path).rows] == ["ok", "failed"]
    assert "NaN" in (Comparison.load(tmp_path).rows[1].reason or "")
    calls.clear()
    monkeypatch.setattr(AutoencoderKL, "decode", broken_after(0))
    failed = run(*arguments[:-1], tmp_path / "other")
    assert failed.exit_code == 2
    assert "NaN" in failed.output
    assert not (tmp_path / "other").exists()


def test_a_folder_that_is_used_again_keeps_nothing_of_the_earlier_report(run: Run, tmp_path: Path) -> None:
    own = tmp_path / "notes.txt"
    own.write_text("mine")
    quick = ("emoji-dit", "--steps", 2, "--prompt", "pizza", "--no-fewer-steps", "--out", tmp_path)
    assert run("compare", *quick, "-r", "FORA()", "-r", "ChannelsLast()").exit_code == 0
    assert (tmp_path / "02-channelslast").is_dir()
    assert run("compare", *quick, "-r", "AttentionBackend()").exit_code == 0
    listed = {image for row in Comparison.load(tmp_path).rows for image in row.images}
    assert {file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("*.png")} == listed
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.is_dir()) == ["00-plain", "01-attentionbackend"]
    assert own.read_text() == "mine"


def test_the_python_interface_gives_the_same(tmp_path: Path) -> None:
    import hasten

    model = hasten.load("emoji-dit")
    workload = model.workload.replace(prompts=model.workload.prompts[:1], steps=3)
    result = hasten.compare(model.pipeline, [hasten.FORA(interval=2), "ChannelsLast()"], workload)
    assert [row.name for row in result.rows[:3]] == ["plain", "FORA()", "ChannelsLast()"]
    assert result.to_json() == Comparison.model_validate_json(result.to_json()).to_json()
