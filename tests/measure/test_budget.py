"""All caches at the same number of full steps."""

from __future__ import annotations

from typing import Any

import pytest

from hasten.cache import FORA, DeepCache, FirstBlockCache, OutputForecast, PlannedCache, TaylorSeer
from hasten.compilation import CompileBlocks
from hasten.core.errors import HastenError
from hasten.core.recipe import Recipe
from hasten.core.technique import Technique
from hasten.measure.budget import at_budget, dial_of, parse_budget
from hasten.measure.compare import compare
from hasten.models import load

STEPS = 8


@pytest.fixture(scope="module")
def model() -> Any:
    return load("emoji-flux", device="cpu")


@pytest.mark.parametrize(
    ("text", "expected"), [("2x", 14), ("3x", 9), ("1x", 28), ("14", 14), (7, 7), ("2.5 X", 11), ("28x", 1)]
)
def test_budgets_are_read(text: str | int, expected: int) -> None:
    assert parse_budget(text, 28) == expected


@pytest.mark.parametrize("text", ["", "x", "0x", "29", "29x", "half", "-2", "2.5", "nan", "1e3"])
def test_other_texts_are_no_budgets(text: str) -> None:
    with pytest.raises(HastenError, match="budget"):
        parse_budget(text, 28)


@pytest.mark.parametrize(
    ("technique", "name", "kind"),
    [
        (FORA(), "interval", "interval"),
        (DeepCache(), "interval", "interval"),
        (FirstBlockCache(), "threshold", "threshold"),
        (OutputForecast(), "full_steps", "count"),
        (PlannedCache(), "full_steps", "count"),
    ],
)
def test_every_cache_says_what_to_turn(technique: Technique, name: str, kind: str) -> None:
    dial = dial_of(Recipe((CompileBlocks(), technique)))
    assert dial is not None
    assert (dial.technique, dial.name, dial.kind) == (technique, name, kind)
    assert dial_of(Recipe((CompileBlocks(),))) is None


def test_a_count_clears_other_budgets() -> None:
    dial = dial_of(Recipe((PlannedCache(min_psnr=30.0),)))
    assert dial is not None
    assert dial.set(7) == PlannedCache(full_steps=7)


@pytest.mark.parametrize("technique", [FORA(), TaylorSeer(), OutputForecast(), FirstBlockCache()])
def test_caches_are_set_to_the_budget(model: Any, technique: Technique) -> None:
    workload = model.workload.replace(steps=STEPS, prompts=model.workload.prompts[:1])
    found = at_budget(model.pipeline, Recipe((technique,)), workload, 4)
    result = compare(model.pipeline, [found], workload, fewer_steps=False)
    steps = result.rows[1].steps
    assert steps is not None
    assert abs(steps.full - 4) <= (1 if isinstance(technique, TaylorSeer) else 0.5)


def test_compare_puts_all_at_the_budget_beside_as_few_plain_steps(model: Any) -> None:
    workload = model.workload.replace(steps=STEPS, prompts=model.workload.prompts[:1])
    result = compare(model.pipeline, ["FORA(interval=7)", "OutputForecast(tolerance=0.1)"], workload, budget="2x")
    named = {row.name: row for row in result.rows}
    assert "FORA()" in named
    assert "OutputForecast(full_steps=4)" in named
    assert "plain, 4 steps" in named
    assert all(row.steps and row.steps.full == 4 for row in result.rows[1:])


def test_a_wrong_budget_is_told_before_anything_runs(model: Any) -> None:
    with pytest.raises(HastenError, match="budget"):
        compare(model.pipeline, ["FORA()"], model.workload, budget="0x")
