"""The README's examples run as written, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from hasten.core.expression import load_recipe
from hasten.core.recipe import Recipe
from hasten.core.registry import techniques

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


PAGES = "".join((ROOT / "docs" / name).read_text("utf-8") for name in ("attention.md", "memory.md"))


@pytest.mark.parametrize("code", [*blocks("python"), *re.findall(r"```python\n(.*?)```", PAGES, re.DOTALL)])
def test_python_examples_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})


def test_the_recipe_file_is_valid() -> None:
    assert all(len(Recipe.from_toml(text)) == 2 for text in blocks("toml"))


def test_recipes_on_the_command_line_are_valid() -> None:
    recipes = re.findall(r'-r "([^"]+)"', README)
    assert len(recipes) >= 3
    assert all(load_recipe(text).techniques for text in recipes)


def test_the_table_names_every_technique() -> None:
    listed = set(re.findall(r"^\| `(\w+)\(", README, re.MULTILINE))
    assert listed == set(techniques())


def test_links_lead_to_files() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    for page in pages:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text("utf-8")):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name}: {link}"


def test_the_commands_are_those_of_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)$", README, re.MULTILINE)) <= targets
