"""A recipe: a set of techniques, joined with `|`; written as Python, as an expression or as TOML."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from hasten.core.errors import HastenError, InvalidSetting, RecipeSyntaxError, UnknownName
from hasten.core.registry import technique
from hasten.core.technique import Technique


@dataclass(frozen=True)
class Recipe:
    """Techniques to apply together; the order in which they are written carries no meaning."""

    techniques: tuple[Technique, ...] = ()

    def __or__(self, other: Technique | Recipe) -> Recipe:
        added = (other,) if isinstance(other, Technique) else other.techniques
        return Recipe(self.techniques + added)

    def __iter__(self) -> Iterator[Technique]:
        return iter(self.techniques)

    def __len__(self) -> int:
        return len(self.techniques)

    def __repr__(self) -> str:
        return " | ".join(map(repr, self.techniques)) or "Recipe()"

    def __str__(self) -> str:
        return " | ".join(map(short, self.techniques)) or "plain"

    def to_toml(self, description: str = "") -> str:
        """Write as TOML text that `from_toml` reads back."""
        head = [f"description = {_quoted(description)}", ""] if description else []
        return "\n".join([*head, *(_table(item) for item in self.techniques)]) or "techniques = []\n"

    @classmethod
    def from_toml(cls, text: str, source: str = "recipe") -> Recipe:
        """Read TOML: a list of tables `[[techniques]]`, each with `use` (the technique) and its parameters."""
        try:
            data = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise _toml_error(error, text, source) from None
        except (ValueError, RecursionError):  # a number with thousands of digits, thousands of brackets
            raise RecipeSyntaxError("not valid TOML.", source, 1, 1) from None
        unknown = sorted(set(data) - {"techniques", "description"})
        if unknown:
            raise HastenError(f"{source}: unknown key {unknown[0]!r}; a recipe has description and techniques.")
        tables = data.get("techniques", [])
        if not isinstance(tables, list):
            raise HastenError(f"{source}: techniques must be a list of tables, written [[techniques]].")
        return cls(tuple(_from_table(table, source) for table in cast("list[object]", tables)))


def as_recipe(value: Recipe | Technique | str) -> Recipe:
    """Accept what users write: a recipe, a technique, or the text of one."""
    if isinstance(value, str):
        from hasten.core.expression import load_recipe

        return load_recipe(value)
    return Recipe((value,)) if isinstance(value, Technique) else value


def short(item: Technique) -> str:
    """The technique as a call with only the parameters that differ from their defaults."""
    return f"{type(item).__name__}({', '.join(f'{n}={v!r}' for n, v in _changed(item).items())})"


def _changed(item: Technique) -> dict[str, object]:
    values = {name: getattr(item, name) for name in item.settings()}
    return {n: v for n, v in values.items() if v != item.settings()[n].default}


def _table(item: Technique) -> str:
    values = {f.name: getattr(item, f.name) for f in dataclasses.fields(item)}
    lines = [f"{name} = {_literal(value)}" for name, value in values.items() if value is not None]
    return "\n".join(["[[techniques]]", f'use = "{type(item).__name__}"', *lines, ""])


def _literal(value: object) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_literal(item) for item in cast("tuple[object, ...]", value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return json.dumps(value) if isinstance(value, bool) else repr(value)


def _quoted(text: str) -> str:
    # TOML, unlike JSON, knows no surrogate pairs and forbids a bare DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _from_table(table: object, source: str) -> Technique:
    if not isinstance(table, dict) or not isinstance(cast("dict[str, Any]", table).get("use"), str):
        raise HastenError(f'{source}: each [[techniques]] table needs a technique, such as use = "CompileBlocks".')
    values = dict(cast(Mapping[str, Any], table))
    try:
        return technique(values.pop("use")).build(values)
    except (UnknownName, InvalidSetting) as error:
        error.args = (f"{source}: {error}",)
        raise


def _toml_error(error: tomllib.TOMLDecodeError, text: str, source: str) -> RecipeSyntaxError:
    message = str(error)
    problem, _, place = message.rpartition(" (at line ")
    if place and (numbers := place.rstrip(")").split(", column ")) and numbers[0].isdigit():
        return RecipeSyntaxError(f"not valid TOML: {problem}.", source, int(numbers[0]), int(numbers[1]))
    lines = text.splitlines() or [""]
    return RecipeSyntaxError(f"not valid TOML: {message}.", source, len(lines), len(lines[-1]) + 1)


def read_recipe_file(path: Path) -> Recipe:
    """Read a recipe from a TOML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # also text that is not UTF-8, and a path with a null byte
        raise HastenError(f"Cannot read the recipe file {path}: {error}.") from None
    return Recipe.from_toml(text, source=str(path))
