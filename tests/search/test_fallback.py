"""Out of memory: the next rung is named, or taken, with an allocator that gives up on purpose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import hasten
from hasten import FORA, OutputForecast, Recipe
from hasten.core.memory_limit import OutOfMemory, within_memory
from hasten.core.session import applied_to
from hasten.core.workload import Workload
from hasten.measure import rendering, runner
from hasten.measure.compare import compare
from hasten.models import load
from hasten.search.actual import Actual, against
from hasten.search.fallback import Adviser, advice, load_or_park, rescued, rescuer
from hasten.search.predict import Prediction
from tests.search.prediction.stand_ins import DEVICE, LADDER, Eighth, InTurn, Streamed, small

WORKLOAD = Workload(prompts=("pizza",), steps=2)


def adviser(**changes: Any) -> Adviser:
    return Adviser(lambda: small().model, small().workload, DEVICE, LADDER, **changes)


def fails_without(*fitting: type) -> Any:
    """Work that runs out of memory unless one of the techniques is there."""

    def work(recipe: Recipe) -> str:
        if not any(isinstance(item, fitting) for item in recipe):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return str(recipe)

    return lambda recipe: within_memory(lambda: work(recipe), str(recipe))


def test_the_next_rung_is_the_fastest_that_needs_less() -> None:
    found = adviser().after(Recipe())
    assert found is not None
    assert str(found.recipe) == "InTurn()"
    assert 'Next to try: -r "InTurn()"' in advice(found)
    assert "parts take turns" in advice(found)


def test_the_recipes_own_techniques_stay() -> None:
    found = adviser().after(Recipe((FORA(interval=2),)))
    assert found is not None
    assert {type(item) for item in found.recipe} == {FORA, InTurn}


def test_rungs_are_taken_one_after_the_other_and_reported() -> None:
    made, taken = rescued(fails_without(Streamed), Recipe(), adviser())
    assert made == "Streamed()"
    assert [str(recipe) for recipe in taken] == ["InTurn()", "Streamed()"]


def test_without_fallback_the_error_says_the_next_rung() -> None:
    with pytest.raises(OutOfMemory, match=r"Out of memory with plain: .* Next to try: -r \"InTurn\(\)\""):
        rescued(fails_without(InTurn), Recipe(), adviser(), fallback=False)


def test_the_last_rung_ends_the_search() -> None:
    with pytest.raises(OutOfMemory, match="No recipe is predicted to need less"):
        rescued(fails_without(), Recipe(), adviser())


def test_a_parked_pipeline_needs_a_recipe_that_brings_it_to_the_device() -> None:
    known = adviser(parked=True)
    assert str(known.enough(Recipe((Eighth(),)))) != "Eighth()"
    assert {type(item) for item in adviser(parked=True).enough(Recipe())} == {InTurn}


def scarce(monkeypatch: pytest.MonkeyPatch, *fitting: type) -> None:
    """Let pictures run out of memory unless one of the techniques is applied."""
    plain = rendering.render

    def render(pipeline: Any, *rest: Any) -> Any:
        if not any(isinstance(item, fitting) for item in applied_to(pipeline.transformer)):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(pipeline, *rest)

    monkeypatch.setattr(runner, "render", render)
    monkeypatch.setattr(rendering, "render", render)


def test_a_comparison_goes_on_with_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    scarce(monkeypatch, InTurn)
    pipeline = load("emoji-dit", device="cpu").pipeline
    rescue = rescuer(adviser(target=hasten.Target.of(pipeline)), fallback=True)
    result = compare(pipeline, [OutputForecast(interval=2)], WORKLOAD, fewer_steps=False, rescue=rescue)
    rows = {row.name: row.recipe for row in result.rows}
    assert rows["plain"] == "InTurn()"
    assert set(rows["OutputForecast()"].split(" | ")) == {"OutputForecast()", "InTurn()"}
    assert "plain ran out of memory; InTurn() was run in its place." in result.warnings
    assert not applied_to(pipeline.transformer)


def test_a_comparison_without_fallback_names_the_next_rung(monkeypatch: pytest.MonkeyPatch) -> None:
    scarce(monkeypatch, InTurn)
    pipeline = load("emoji-dit", device="cpu").pipeline
    rescue = rescuer(adviser(), fallback=False)
    with pytest.raises(OutOfMemory, match=r"InTurn\(\)"):
        compare(pipeline, [], WORKLOAD, fewer_steps=False, rescue=rescue)


def test_every_row_of_a_pipeline_that_does_not_fit_has_the_base() -> None:
    pipeline = load("emoji-dit", device="cpu").pipeline
    result = compare(pipeline, [], WORKLOAD, fewer_steps=False, base=Recipe((InTurn(),)))
    assert [row.recipe for row in result.rows] == ["InTurn()"]


def test_a_model_that_does_not_fit_is_loaded_into_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    import hasten.search.fallback as module

    plain = module.load

    def scarce_load(name: str, *, device: str | None, dtype: str | None, base: str | None = None) -> Any:
        if device != "cpu":
            raise OutOfMemory(name, "CUDA out of memory.")
        return plain(name, device=device, dtype=dtype)

    monkeypatch.setattr(module, "load", scarce_load)
    loaded, parked = load_or_park("emoji-dit", device=None, dtype=None, fallback=True)
    assert parked
    assert loaded.pipeline.transformer.dtype == torch.bfloat16
    with pytest.raises(OutOfMemory, match="hasten plan emoji-dit"):
        load_or_park("emoji-dit", device=None, dtype=None, fallback=False)


def test_predicted_stands_against_actual() -> None:
    prediction = Prediction(Recipe(), memory=2**30, step_seconds=0.1, seconds=3.0)
    lines = against(prediction, Actual(seconds=2.5, denoise_seconds=2.0, memory=2**31), steps=20)
    assert lines == [
        "peak memory: 1.00 GiB predicted, 2.00 GiB measured (-50 %)",
        "denoising step: 100 ms predicted, 100 ms measured (+0 %)",
        "a picture: 3 s predicted, 2.5 s measured (+20 %)",
    ]
