"""Recipe expressions: literals only; everything else is refused with a place, and nothing ever runs."""

from __future__ import annotations

import ast
import builtins
import os
import subprocess
from collections.abc import Generator
from typing import NoReturn

import pytest

from hasten.cache import DeepCache, FirstBlockCache
from hasten.compilation import CompileBlocks
from hasten.core.errors import HastenError, InvalidSetting, RecipeSyntaxError, UnknownName
from hasten.core.expression import LONGEST, load_recipe, named_recipes, parse
from hasten.core.recipe import Recipe
from hasten.core.resolve import resolve
from hasten.core.target import Target

ran: list[str] = []


def canary(*_: object, **__: object) -> NoReturn:
    ran.append("called")
    raise AssertionError("an expression was evaluated")


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    ran.clear()
    monkeypatch.setattr(os, "system", canary)
    monkeypatch.setattr(subprocess, "Popen", canary)
    monkeypatch.setattr(builtins, "canary", canary, raising=False)
    yield
    assert not ran


@pytest.mark.parametrize(
    ("text", "column"),
    [
        ("__import__('os').system('true')", 1),
        ("CompileBlocks(backend=__import__('os').system('true'))", 23),
        ("CompileBlocks(backend=canary())", 23),
        ("CompileBlocks(backend=canary)", 23),
        ("CompileBlocks(canary())", 15),
        ("CompileBlocks().claims()", 1),
        ("CompileBlocks.__class__", 1),
        ("CompileBlocks.build({})", 1),
        ("(lambda: canary())()", 1),
        ("lambda: CompileBlocks()", 1),
        ("[CompileBlocks() for _ in canary()]", 1),
        ("CompileBlocks(backend=[canary() for _ in 'a'])", 23),
        ("CompileBlocks(backend=f'{canary()}')", 23),
        ("CompileBlocks(backend='a' 'b' + canary())", 23),
        ("CompileBlocks(backend='a' if canary() else 'b')", 23),
        ("CompileBlocks(backend=(x := canary()))", 24),
        ("CompileBlocks(backend='%s' % canary())", 23),
        ("CompileBlocks(**canary())", 17),
        ("CompileBlocks(*canary())", 15),
        ("CompileBlocks() + CompileBlocks()", 1),
        ("CompileBlocks() or canary()", 1),
        ("CompileBlocks() | canary", None),
        ("CompileBlocks() | canary()", None),
        ("CompileBlocks() | 3", 19),
        ("CompileBlocks() |", 18),
        ("CompileBlocks(", 14),
        ("CompileBlocks()[canary()]", 1),
        ("FirstBlockCache(threshold=-canary())", 27),
        ("FirstBlockCache(threshold=1+1)", 27),
        ("FirstBlockCache(threshold=2**9999)", 27),
        ("FirstBlockCache(threshold=FirstBlockCache())", 27),
        ("__builtins__", None),
        ("__class__()", None),
        ("canary()", None),
        ("await canary()", 1),
        ("import os", 1),
        ("CompileBlocks(); canary()", 16),
        ("CompileBlocks()\ncanary()", 1),
        ("", 1),
        ("| CompileBlocks()", 1),
        ("'CompileBlocks()'", 1),
        ("CompileBlocks(\0)", 17),
    ],
)
def test_everything_but_literals_is_refused_and_nothing_runs(text: str, column: int | None) -> None:
    with pytest.raises((RecipeSyntaxError, UnknownName)) as caught:
        load_recipe(text)
    if column is None:
        assert isinstance(caught.value, UnknownName)
        assert caught.value.kind in ("technique", "recipe or technique")
    else:
        assert isinstance(caught.value, RecipeSyntaxError)
        assert f"column {column}: " in str(caught.value)
        assert caught.value.column == column


@pytest.mark.parametrize(
    "text",
    [
        "CompileBlocks() | " * 600 + "CompileBlocks()",
        "(" * 500 + "CompileBlocks()" + ")" * 500,
        "CompileBlocks(backend=" + "[" * 3000 + "]" * 3000 + ")",
        "FirstBlockCache(threshold=" + "-" * 9000 + "1)",
        "FirstBlockCache(threshold=" + "not " * 2000 + "1)",
        "a|" * 4999 + "a",
        "FirstBlockCache(threshold=" + "9" * 9000 + ")",
        "a" * (LONGEST + 1) + "()",
    ],
)
def test_long_and_deep_texts_are_refused(text: str) -> None:
    with pytest.raises(RecipeSyntaxError, match=r"recipe, line \d+, column \d+: "):
        parse(text)


@pytest.mark.parametrize(
    "threshold", ["nan", "-1", "1e999", "-0.001", "'0.1'", "True", "None", "(0.1,)", "{}", "1j", "b'1'"]
)
def test_wrong_types_and_absurd_values(threshold: str) -> None:
    with pytest.raises((InvalidSetting, RecipeSyntaxError), match="column"):
        parse(f"FirstBlockCache(threshold={threshold})")


def test_numbers_too_large_for_a_float() -> None:
    for threshold in ("1" + "0" * 400, "-1" + "0" * 400):
        with pytest.raises(InvalidSetting, match="finite"):
            parse(f"FirstBlockCache(threshold={threshold})")


def test_unknown_names_suggest_neighbours() -> None:
    with pytest.raises(UnknownName, match=r"'FirstBlockCach'. Did you mean FirstBlockCache\?"):
        parse("FirstBlockCach(threshold=1)")
    with pytest.raises(UnknownName, match=r"parameter of CompileBlocks called 'fulgraph'. Did you mean fullgraph\?"):
        parse("CompileBlocks(fulgraph=True)")
    with pytest.raises(UnknownName, match=r"no recipe or technique called 'compileblock'. Did you mean CompileBlocks"):
        load_recipe("compileblock")
    with pytest.raises(UnknownName, match="no parameter of ChannelsLast called 'x'. None is available"):
        parse("ChannelsLast(x=1)")


def test_a_wrong_choice_names_the_choices() -> None:
    with pytest.raises(InvalidSetting, match=r"column 19: CompileBlocks\(mode='defalt'\).*Did you mean default\?"):
        parse("FirstBlockCache | CompileBlocks(mode='defalt')")


def test_parameters_are_named_and_named_once() -> None:
    with pytest.raises(RecipeSyntaxError, match=r"column 17: write the parameter's name: FirstBlockCache\(threshold="):
        parse("FirstBlockCache(0.1)")
    with pytest.raises(RecipeSyntaxError, match="column 42: each parameter is named once"):
        parse("FirstBlockCache(threshold=0.1, threshold=0.2)")


def test_a_second_line_is_counted() -> None:
    with pytest.raises(RecipeSyntaxError, match="line 2, column 3"):
        parse("(CompileBlocks() |\n  3)")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", Recipe()),
        ("Recipe()", Recipe()),
        (" CompileBlocks ", Recipe((CompileBlocks(),))),
        ("CompileBlocks | FirstBlockCache(threshold=1)", CompileBlocks() | FirstBlockCache(threshold=1.0)),
        ("(CompileBlocks() | plain)", Recipe((CompileBlocks(),))),
        ("FirstBlockCache(threshold=0.1,)|DeepCache()", FirstBlockCache(threshold=0.1) | DeepCache()),
    ],
)
def test_what_is_a_recipe(text: str, expected: Recipe) -> None:
    assert load_recipe(text) == expected


def test_recipe_takes_no_arguments() -> None:
    for text in ("Recipe(techniques=())", "Recipe((CompileBlocks(),))"):
        with pytest.raises(UnknownName):
            parse(text)


def test_every_shipped_recipe_is_read_by_its_name() -> None:
    for name, recipe in named_recipes().items():
        assert load_recipe(name) == recipe
        assert parse(repr(recipe)) == recipe


@pytest.mark.parametrize("name", ["fastest", "fastest_exact"])
@pytest.mark.parametrize("model", ["FLUX.1-dev", "Z-Image-Turbo", "Qwen-Image", "DiT-XL-2-256"])
def test_the_fastest_recipes_fit_transformers(name: str, model: str) -> None:
    assert not resolve(load_recipe(name), Target.planned(model)).refusals


def test_a_shipped_recipe_that_does_not_exist() -> None:
    with pytest.raises(UnknownName, match="There is no recipe or technique called 'my-recipe'"):
        load_recipe("my-recipe")


def test_the_parser_would_notice_an_evaluation() -> None:
    tree = compile(ast.parse("canary()", mode="eval"), "recipe", "eval")
    with pytest.raises(AssertionError, match="evaluated"):
        exec(tree)
    assert ran
    ran.clear()


def test_errors_are_hastens_own() -> None:
    assert issubclass(RecipeSyntaxError, HastenError)
    assert issubclass(UnknownName, HastenError)
