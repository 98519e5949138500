"""Recipes: joining, three ways of writing one, and files that are not what they should be."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.attention import AttentionBackend
from hasten.cache import FirstBlockCache
from hasten.compilation import ChannelsLast, CompileBlocks
from hasten.core.errors import HastenError, InvalidSetting, RecipeSyntaxError, UnknownName
from hasten.core.expression import load_recipe, parse
from hasten.core.recipe import Recipe, as_recipe, read_recipe_file
from tests.core.drawn import recipes

CACHE, COMPILE = FirstBlockCache(threshold=0.1), CompileBlocks()
thorough = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@thorough
@given(recipe=recipes(), description=st.text(st.characters(codec="utf-8")))
def test_every_recipe_survives_toml(recipe: Recipe, description: str) -> None:
    assert Recipe.from_toml(recipe.to_toml(description)) == recipe


@thorough
@given(recipe=recipes())
def test_every_recipe_survives_being_written_as_an_expression(recipe: Recipe) -> None:
    assert parse(repr(recipe)) == recipe
    if recipe:
        assert parse(str(recipe)) == recipe


@thorough
@given(text=st.text(max_size=60))
def test_any_text_is_a_recipe_or_a_plain_error(text: str) -> None:
    for read in (load_recipe, Recipe.from_toml):
        try:
            assert isinstance(read(text), Recipe)
        except HastenError as error:
            assert str(error)


def test_joining() -> None:
    joined = CACHE | COMPILE | Recipe((ChannelsLast(),))
    assert joined.techniques == (CACHE, COMPILE, ChannelsLast())
    assert Recipe((CACHE,)) | COMPILE == CACHE | COMPILE
    assert len(joined) == 3
    assert list(joined) == [CACHE, COMPILE, ChannelsLast()]


def test_the_short_form_shows_what_differs_from_the_defaults() -> None:
    assert str(CACHE | COMPILE) == "FirstBlockCache(threshold=0.1) | CompileBlocks()"
    assert (str(Recipe()), repr(Recipe())) == ("plain", "Recipe()")


def test_what_users_hand_over() -> None:
    assert as_recipe(CACHE) == as_recipe("FirstBlockCache(threshold=0.1)") == as_recipe(Recipe((CACHE,)))


@pytest.mark.parametrize(
    ("text", "line", "column"),
    [
        ("[[techniques]]\nuse = \n", 2, 7),
        ("[[techniques]\n", 1, 13),
        ('a = "x', 1, 7),
        ("[[techniques]]\nuse = 'A'\nuse = 'B'\n", 3, 10),
        ("[[techniques]]\nuse = 'CompileBlocks'\nmode = 1.\n", 3, 9),
    ],
)
def test_a_toml_error_is_located(text: str, line: int, column: int) -> None:
    with pytest.raises(RecipeSyntaxError, match=rf"my\.toml, line {line}, column {column}: not valid TOML") as caught:
        Recipe.from_toml(text, "my.toml")
    assert (caught.value.line, caught.value.column) == (line, column)


@pytest.mark.parametrize("text", [f"a = {'9' * 5000}", f"a = {'[' * 5000}"])
def test_absurd_toml_is_refused(text: str) -> None:
    with pytest.raises(RecipeSyntaxError, match="not valid TOML"):
        Recipe.from_toml(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("technique = []", "unknown key 'technique'"),
        ("techniques = 3", r"written \[\[techniques\]\]"),
        ("techniques = [3]", "needs a technique"),
        ("[[techniques]]\nthreshold = 1.0", "needs a technique"),
        ("[[techniques]]\nuse = 7", "needs a technique"),
    ],
)
def test_toml_of_another_shape(text: str, message: str) -> None:
    with pytest.raises(HastenError, match=message):
        Recipe.from_toml(text)


def table(use: str, parameters: str = "") -> str:
    return f'[[techniques]]\nuse = "{use}"\n{parameters}\n'


def test_toml_with_unknown_names_suggests_neighbours() -> None:
    with pytest.raises(UnknownName, match=r"no technique called 'CompileBlock'. Did you mean CompileBlocks"):
        Recipe.from_toml(table("CompileBlock"))
    with pytest.raises(UnknownName, match=r"no parameter of FirstBlockCache called 'treshold'.*mean threshold\?"):
        Recipe.from_toml(table("FirstBlockCache", "treshold = 0.1"))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-0.1", '"0.1"', "true", "[0.1]", "1979-05-27", "{a = 1}"])
def test_toml_with_absurd_values(value: str) -> None:
    with pytest.raises(InvalidSetting, match="FirstBlockCache"):
        Recipe.from_toml(table("FirstBlockCache", f"threshold = {value}"))


def test_an_integer_stands_for_a_float() -> None:
    assert Recipe.from_toml(table("FirstBlockCache", "threshold = 1")).techniques == (FirstBlockCache(threshold=1.0),)


def test_a_recipe_file(tmp_path: Path) -> None:
    file = tmp_path / "my recipe.toml"
    file.write_text((CACHE | AttentionBackend(name="math")).to_toml("what it is for"), "utf-8")
    assert load_recipe(str(file)) == read_recipe_file(file) == CACHE | AttentionBackend(name="math")
    assert file.read_text("utf-8").startswith('description = "what it is for"')


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    (tmp_path / "latin.toml").write_bytes(b"description = '\xe9'")
    for name in ("missing.toml", "folder.toml", "latin.toml", "null\0byte.toml"):
        with pytest.raises(HastenError, match="Cannot read the recipe file"):
            load_recipe(str(tmp_path / name))


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("[[techniques]]\nuse == 'x'\n")
    with pytest.raises(RecipeSyntaxError, match=r"broken\.toml, line 2, column 6"):
        load_recipe(str(file))
