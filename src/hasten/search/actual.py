"""Predicted against actual, after a real run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from hasten.core.errors import HastenError
from hasten.core.recipe import Recipe
from hasten.core.target import Target
from hasten.core.workload import Workload
from hasten.measure.comparison import Comparison
from hasten.search.predict import Prediction, Profile, predict, profile
from hasten.search.prediction.here import device_here
from hasten.search.prediction.model import planned_from


@dataclass(frozen=True)
class Actual:
    """What a run took for one picture: seconds, of these denoising, and the peak of allocated device memory."""

    seconds: float
    denoise_seconds: float | None = None
    memory: int | None = None
    """Bytes; None where the device does not count them (a CPU)."""


def against(prediction: Prediction, actual: Actual, steps: int) -> list[str]:
    """One line for each figure: predicted, measured, and the difference of the prediction in percent."""
    lines: list[str] = []
    if prediction.memory is not None and actual.memory:
        size, taken = prediction.memory / 2**30, actual.memory / 2**30
        lines.append(f"peak memory: {size:.2f} GiB predicted, {taken:.2f} GiB measured ({_off(size, taken)})")
    if prediction.step_seconds is not None and actual.denoise_seconds:
        step, took = 1e3 * prediction.step_seconds, 1e3 * actual.denoise_seconds / steps
        lines.append(f"denoising step: {step:.3g} ms predicted, {took:.3g} ms measured ({_off(step, took)})")
    if prediction.seconds is not None:
        lines.append(
            f"a picture: {prediction.seconds:.3g} s predicted, {actual.seconds:.3g} s measured "
            f"({_off(prediction.seconds, actual.seconds)})"
        )
    return lines


def _off(predicted: float, measured: float) -> str:
    return f"{100 * (predicted / measured - 1):+.0f} %" if measured else "nothing measured"


def profile_of(pipeline: Any, workload: Workload) -> Profile:
    """Profile a live pipeline; do it before a recipe changes its parts."""
    return profile(planned_from(pipeline, workload=workload), workload)


def run_against(pipeline: Any, recipe: Recipe, workload: Workload, actual: Actual) -> list[str]:
    """Predict what has just been measured; empty where nothing is known of the device (see `hasten plan`).

    Call it when the recipe's session is closed: the prediction starts from the plain pipeline.
    """
    device = device_here(Target.of(pipeline).device)
    if device is None:
        return []
    try:
        return against(predict(profile_of(pipeline, workload), device, recipe), actual, workload.steps)
    except HastenError:  # an architecture without a specification has no example inputs
        return []


def comparison_against(pipeline: Any, comparison: Comparison, recipes: Iterable[tuple[str, Recipe]]) -> list[str]:
    """Predicted against actual for the plain pipeline and each recipe of a comparison, by the names of its rows."""
    record, target = comparison.workload, Target.of(pipeline)
    device = device_here(target.device)
    if device is None:
        return []
    workload = Workload(
        width=record.width,
        height=record.height,
        steps=record.steps,
        guidance=record.guidance,
        max_sequence_length=record.max_sequence_length,
    )
    known = {"plain": Recipe(), **dict(recipes)}
    try:
        found, lines = profile_of(pipeline, workload), list[str]()
        for row in comparison.rows:
            if row.name in known and row.seconds_per_image and row.phases:
                counted = row.peak_memory_bytes if target.device.type == "cuda" else None
                actual = Actual(row.seconds_per_image.median, row.phases.denoise, counted)
                lines += [
                    f"{row.name}: {line}"
                    for line in against(predict(found, device, known[row.name]), actual, record.steps)
                ]
    except (HastenError, NotImplementedError):
        return []
    return lines
