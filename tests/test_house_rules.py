"""What CONTRIBUTING.md promises about the code, checked."""

from __future__ import annotations

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hasten.core.registry import FAMILIES

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "hasten").rglob("*.py"))
LAYERS = ["core", "kernels", "denoisers", "models", "formats", "family", "measure", "search", "cli"]
"""Each may import those before it; `models` and the families do not import each other."""


def part_of(module: str) -> str:
    """The part of the package that a module belongs to; the package's own files stand above all."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] != "__main__" else "cli"


def layer(part: str) -> int:
    return LAYERS.index("family" if part in FAMILIES else part)


def imported(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("hasten."):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("hasten."))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT / "src").as_posix())
def test_imports_point_one_way(file: Path) -> None:
    own = part_of(".".join(file.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__"))
    for module in imported(file):
        other = part_of(module)
        assert layer(other) <= layer(own), f"{own} imports {module}"
        assert own == other or own not in FAMILIES or other not in FAMILIES, f"{own} imports {module}"


def test_models_need_the_core_alone() -> None:
    files = [file for file in SOURCES if file.parent.name == "models"]
    assert {part_of(module) for file in files for module in imported(file)} == {"core"}


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT / "src").as_posix())
def test_every_public_module_says_what_it_is_for(file: Path) -> None:
    text = file.read_text("utf-8")
    assert (
        ast.get_docstring(ast.parse(text))
        or not text.strip()
        or (file.name.startswith("_") and file.stem != "__init__")
    )


def functions() -> list[tuple[int, str]]:
    """Length in lines (without the docstring) and place of every function."""
    found: list[tuple[int, str]] = []
    for file in SOURCES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[1] if ast.get_docstring(node) and len(node.body) > 1 else node.body[0]
                length = (node.end_lineno or 0) - first.lineno + 1
                found.append((length, f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return sorted(found, reverse=True)


def test_functions_are_short() -> None:
    lengths = [length for length, _ in functions()]
    offenders = "\n".join(f"{length} {place}" for length, place in functions()[:10])
    assert statistics.median(lengths) <= 8, offenders
    assert statistics.quantiles(lengths, n=10)[-1] <= 30, offenders
    assert max(lengths) <= 60, offenders


def test_files_are_short() -> None:
    for folder, limit in (("src", 300), ("tests", 500)):
        files = {file: len(file.read_text("utf-8").splitlines()) for file in (ROOT / folder).rglob("*.py")}
        assert not {file.name: lines for file, lines in files.items() if lines > limit}


def test_importing_is_instant_and_the_core_needs_nothing_slow() -> None:
    slow = {"diffusers", "transformers", "torchmetrics", "rich", "typer", "jinja2", "pydantic"}
    code = "import sys, hasten; a = 'torch' in sys.modules; hasten.accelerate; print(a, *sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert found[0] == "False"
    assert not slow & set(found[1:])


def test_the_repository_names_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split(
        "\n"
    )
    texts = [ROOT / name for name in listed if name.endswith((".py", ".md", ".toml", ".txt", ".sh", ".json"))]
    pattern = re.compile(r"(?<![\w.])(?:/work/|/root/|/home/(?!me\b))\w+")
    found = {
        file.name: match[0] for file in texts if file.exists() and (match := pattern.search(file.read_text("utf-8")))
    }
    found.pop(Path(__file__).name, None)
    assert not found
