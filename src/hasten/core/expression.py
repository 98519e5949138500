"""Reads recipe expressions such as `FirstBlockCache(threshold=0.1) | CompileBlocks()`; nothing is evaluated."""

from __future__ import annotations

import ast
import functools
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from hasten.core.errors import InvalidSetting, RecipeSyntaxError, UnknownName
from hasten.core.recipe import Recipe, read_recipe_file
from hasten.core.registry import technique, techniques
from hasten.core.technique import Technique

LONGEST = 10_000
"""Longest expression in characters; a recipe is a line, not a program."""


def load_recipe(text: str) -> Recipe:
    """Read a recipe given as a name (`plain`, a shipped recipe), a `.toml` file or an expression."""
    text = text.strip()
    if text.endswith(".toml"):
        return read_recipe_file(Path(text))
    if text in named_recipes():
        return named_recipes()[text]
    if text in techniques():
        return Recipe((technique(text).build({}),))
    if text.isidentifier() or (not any(sign in text for sign in "(|") and _looks_like_name(text)):
        raise UnknownName("recipe or technique", text, [*named_recipes(), *techniques()])
    return parse(text)


@functools.cache
def named_recipes() -> Mapping[str, Recipe]:
    """The recipes that ship with hasten, by name; `plain` is the empty one."""
    found = {"plain": Recipe()}
    folder = resources.files("hasten") / "recipes"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name) if folder.is_dir() else []:
        if entry.name.endswith(".toml"):
            found[entry.name.removesuffix(".toml")] = Recipe.from_toml(entry.read_text("utf-8"), entry.name)
    return MappingProxyType(found)


def parse(text: str, source: str = "recipe") -> Recipe:
    """Read an expression: calls of techniques with literal keyword arguments, joined with `|`."""
    if len(text) > LONGEST:
        problem = f"a recipe expression has at most {LONGEST} characters; this one has {len(text)}."
        raise RecipeSyntaxError(problem, source, 1, LONGEST + 1)
    try:
        tree = ast.parse(text, mode="eval")
        return Recipe(tuple(_techniques(tree.body, source)))
    except SyntaxError as error:
        problem = f"not a recipe expression: {error.msg}."
        at_end = len(text.splitlines()[-1]) + 1 if text else 1  # Python gives no offset for an unexpected end
        raise RecipeSyntaxError(problem, source, error.lineno or 1, error.offset or at_end) from None
    except (RecursionError, MemoryError, ValueError):
        raise RecipeSyntaxError("not a recipe expression.", source, 1, 1) from None


def _techniques(node: ast.expr, source: str) -> list[Technique]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _techniques(node.left, source) + _techniques(node.right, source)
    if isinstance(node, ast.Name):
        return list(named_recipes()[node.id]) if node.id in named_recipes() else [technique(node.id).build({})]
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        is_empty_recipe = node.func.id == "Recipe" and not node.args and not node.keywords
        return [] if is_empty_recipe else [_call(node, node.func.id, source)]
    raise _misplaced(node, "expected a technique such as CompileBlocks(), joined with |", source)


def _call(node: ast.Call, name: str, source: str) -> Technique:
    cls = technique(name)
    if node.args:
        raise _misplaced(node.args[0], f"write the parameter's name: {name}({_first(cls)}=...)", source)
    values: dict[str, object] = {}
    for keyword in node.keywords:
        if keyword.arg is None or keyword.arg in values:
            raise _misplaced(keyword.value, "each parameter is named once", source)
        values[keyword.arg] = _literal(keyword.value, source)
    try:
        return cls.build(values)
    except InvalidSetting as error:
        raise InvalidSetting(f"{source}, column {node.col_offset + 1}: {error}") from None


def _literal(node: ast.expr, source: str) -> object:
    try:
        value: object = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        raise _misplaced(node, "expected a number, a text in quotes, True, False, None or a tuple", source) from None
    return value


def _first(cls: type[Technique]) -> str:
    return next(iter(cls.settings()), "name")


def _misplaced(node: ast.expr, problem: str, source: str) -> RecipeSyntaxError:
    return RecipeSyntaxError(f"{problem}.", source, node.lineno, node.col_offset + 1)


def _looks_like_name(text: str) -> bool:
    return bool(text) and all(part.isidentifier() for part in text.replace("-", "_").split("_") if part)
