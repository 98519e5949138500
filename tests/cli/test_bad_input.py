"""Wrong input: one clear sentence, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hasten.models import bundled
from tests.cli.conftest import Run


@pytest.fixture
def truncated(tmp_path: Path) -> Path:
    folder = tmp_path / "damaged"
    shutil.copytree(bundled()["emoji-dit"], folder)
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def check(run: Run, out: Path, expected: str, *arguments: object) -> None:
    result = run(*arguments, "--out", out)
    text = " ".join(result.output.split())
    assert result.exit_code == 2, text
    assert "Traceback" not in text
    assert expected in text
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("emoji-flax",), "Did you mean emoji-flux"),
        (("-r", "FirstBlokCache()"), "Did you mean FirstBlockCache"),
        (("-r", "FirstBlockCache(treshold=0.1)"), "Did you mean threshold"),
        (("-r", "FirstBlockCache(threshold='much')"), "expected float, got str"),
        (("-r", "FirstBlockCache(threshold=-1.0)"), "at least 0"),
        (("-r", "AttentionBackend(name='flsh')"), "Did you mean flash"),
        (("-r", "FirstBlockCache(threshold=0.1"), "column"),
        (("-r", "CompileBlocks() | "), "line 1, column"),
        (("-r", "__import__('os').system('true')"), "expected a technique"),
        (("-r", "no_such_file.toml"), "Cannot read the recipe file"),
        (("--guidance", "nan"), "finite number"),
        (("--size", "big"), "write it as 1024x1024"),
        (("--size", "100x100"), "multiple of 8"),
        (("--steps", "0"), "at least 1"),
        (("--prompts", "no_such_prompts.txt"), "Cannot read the prompts file"),
        (("--dtype", "float12"), "Did you mean float"),
        (("--device", "cuda:7"), "cannot be used"),
        (("emoji-dit", "--prompt", "piza"), "Did you mean pizza"),
        (("emoji-dit", "--size", "256x256"), "128x128 only"),
    ],
)
def test_it_is_refused(run: Run, tmp_path: Path, arguments: tuple[str, ...], expected: str) -> None:
    check(run, tmp_path / "out", expected, "compare", *arguments)


def test_a_recipe_file_with_a_syntax_error(run: Run, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[[techniques]]\nuse = "FORA"\ninterval = = 3\n')
    check(run, tmp_path / "out", "line 3, column 12", "compare", "-r", recipe)


@pytest.mark.parametrize(("line", "expected"), [("FORAX", "Did you mean FORA"), ('FORA"\nintervall = "3', "interval")])
def test_a_wrong_name_in_a_recipe_file_names_the_file(run: Run, tmp_path: Path, line: str, expected: str) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f'[[techniques]]\nuse = "{line}"\n')
    check(run, tmp_path / "out", f"{recipe}: There is no", "compare", "-r", recipe)
    check(run, tmp_path / "out", expected, "compare", "-r", recipe)


def test_a_folder_that_is_no_pipeline(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    check(run, tmp_path / "out", "no model_index.json", "compare", tmp_path / "empty")


def test_a_truncated_weight_file(run: Run, truncated: Path, tmp_path: Path) -> None:
    check(run, tmp_path / "out", "is damaged", "compare", truncated)


def test_an_unwritable_output_folder(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    result = run("compare", "--out", tmp_path / "file")
    assert result.exit_code == 2
    assert "Cannot create the folder" in result.output


def test_generate_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    result = run("generate", "emoji-flux", "pizza", "-r", "DeepCache()", "--out", tmp_path / "x.png")
    assert result.exit_code == 2
    assert "no U-Net" in result.output
    assert not list(tmp_path.iterdir())
