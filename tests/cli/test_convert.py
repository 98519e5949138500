"""`convert` and `verify`, and commands on what they wrote."""

from __future__ import annotations

from pathlib import Path

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
