"""`convert` and `verify`, and commands on what they wrote."""

from __future__ import annotations

from pathlib import Path

import hasten
from hasten.models import bundled
from tests.cli.conftest import Run


def test_a_model_goes_through_formats_and_draws(run: Run, tmp_path: Path) -> None:
    folder = bundled()["emoji-flux"] / "transformer"
    first, second = tmp_path / "a.gguf", tmp_path / "b.safetensors"
    result = run("convert", folder, first, "--format", "gguf", "--type", "Q8_0", "--keys", "original")
    assert result.exit_code == 0, result.output
    assert "0 recoded" in result.output
    assert f"sha256 {(tmp_path / 'a.gguf.sha256').read_text().split()[0]}" in result.output
    result = run("convert", first, second, "-f", "hasten", "--rotate", "--keys", "diffusers")
    assert result.exit_code == 0, result.output
    shown = run("verify", second)
    assert shown.exit_code == 0, shown.output
    assert "rotated by 128" in shown.output
    assert "All numbers are finite" in shown.output
    picture = tmp_path / "p.png"
    options = ("--base", "emoji-flux", "--steps", 2, "--out", picture, "--device", "cpu")
    result = run("generate", second, "pizza, fluent style", *options)
    assert result.exit_code == 0, result.output
    assert picture.is_file()


def test_mistakes_are_one_sentence(run: Run, tmp_path: Path) -> None:
    folder = bundled()["emoji-flux"] / "transformer"
    result = run("convert", folder, tmp_path / "a.gguf", "--format", "ggu")
    assert result.exit_code == 2
    assert "Did you mean gguf" in result.output
    result = run("verify", tmp_path / "none.gguf")
    assert (result.exit_code, "There is no file" in result.output) == (2, True)
    result = run("generate", tmp_path, "x", "--out", tmp_path / "p.png")
    assert (result.exit_code, "no model_index.json" in result.output) == (2, True)


def test_damage_is_found(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    run("convert", bundled()["emoji-dit"] / "transformer", target, "-f", "hasten", "--type", "int8")
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(data)
    result = run("verify", target)
    assert result.exit_code == 2
    assert "is damaged: its SHA-256 is" in result.output


def test_a_quantized_folder_is_inspected_and_not_planned_for(run: Run, tmp_path: Path) -> None:
    loaded = hasten.load("emoji-dit", device="cpu")
    hasten.apply_permanently(loaded.pipeline, hasten.WeightOnly(bits=4, originals="drop"))
    folder = hasten.save(loaded.pipeline, tmp_path / "q")
    plain, coded = run("inspect", "emoji-dit"), run("inspect", folder)
    assert coded.exit_code == 0, coded.output

    def row(text: str) -> list[str]:
        return next(line for line in text.splitlines() if "DiTTransformer2DModel" in line).split("│")

    assert row(plain.output)[3] == row(coded.output)[3]
    sizes = [float(row(text)[4].split()[0]) for text in (plain.output, coded.output)]
    assert sizes[1] < 0.5 * sizes[0]
    planned = run("plan", folder)
    assert (planned.exit_code, "holds quantized weights" in planned.output) == (2, True)
