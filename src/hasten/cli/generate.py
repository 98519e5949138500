"""`hasten generate`: one picture with a recipe applied."""

from __future__ import annotations

import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hasten.cli.common import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    FallbackOption,
    GuidanceOption,
    ModelArgument,
    SizeOption,
    StepsOption,
    adjusted,
    gather_statistics,
    out,
    quiet,
    reports_errors,
)

if TYPE_CHECKING:
    from PIL.Image import Image

    from hasten.core.recipe import Recipe
    from hasten.core.workload import Workload
    from hasten.search.actual import Actual


@reports_errors
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(help="What to draw; for a class-conditional model a class name.")],
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help="The recipe to apply.")] = "plain",
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 0,
    steps: StepsOption = None,
    size: SizeOption = None,
    guidance: GuidanceOption = None,
    file: Annotated[Path, typer.Option("--out", metavar="FILE", help="Where the PNG goes.")] = Path("hasten.png"),
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    fallback: FallbackOption = False,
    base_model: BaseOption = None,
) -> None:
    """Make one picture with a recipe applied, and say what the recipe did."""
    from hasten.core.expression import load_recipe
    from hasten.core.files import atomic_write_bytes, ensure_writable
    from hasten.search.actual import run_against
    from hasten.search.fallback import Adviser, load_or_park, rescued

    applied = load_recipe(recipe)
    ensure_writable(file.parent)
    quiet()
    loaded, parked = load_or_park(model, base=base_model, device=device, dtype=dtype, fallback=fallback)
    if not parked:
        gather_statistics(loaded, (applied,))
    workload = adjusted(loaded.workload, prompts=(prompt,), steps=steps, size=size, guidance=guidance)
    adviser = Adviser.of(loaded.pipeline, workload, parked=parked)
    began = adviser.enough(applied) if parked else applied

    def once(tried: Recipe) -> Made:
        return _make(loaded.pipeline, tried, workload, prompt, seed)

    made, taken = rescued(once, began, adviser, fallback=fallback)
    buffer = BytesIO()
    made.image.save(buffer, "PNG")
    atomic_write_bytes(file, buffer.getvalue())
    for step in ([began] if parked else []) + taken:
        out.print(f"Out of memory; went on with {step}", highlight=False, markup=False, soft_wrap=True)
    if made.recipe.techniques:
        out.print(made.summary, highlight=False, markup=False)
    for line in run_against(loaded.pipeline, made.recipe, workload, made.actual):
        out.print(line, highlight=False, markup=False)
    picture = f"{made.image.width}x{made.image.height}, {made.actual.seconds:.2f} s"
    out.print(f"{file.resolve()}  ({picture})", soft_wrap=True, highlight=False)


@dataclass(frozen=True)
class Made:
    """One picture and how it was made."""

    image: Image
    recipe: Recipe
    summary: str
    actual: Actual


def _make(pipeline: Any, recipe: Recipe, workload: Workload, prompt: str, seed: int) -> Made:
    """Make one picture; raises OutOfMemory where the device has too little memory."""
    from hasten.core.memory_limit import within_memory

    return within_memory(lambda: _applied(pipeline, recipe, workload, prompt, seed), str(recipe))


def _applied(pipeline: Any, recipe: Recipe, workload: Workload, prompt: str, seed: int) -> Made:
    from hasten.core.session import accelerate
    from hasten.core.target import Target
    from hasten.measure.instruments import PeakMemory, Stopwatch
    from hasten.measure.rendering import render
    from hasten.search.actual import Actual

    with accelerate(pipeline, recipe) as session:
        target = Target.of(pipeline)
        watch, memory, began = Stopwatch(target), PeakMemory(target.device), time.perf_counter()
        with watch.running(), memory.watching():
            image = render(pipeline, workload, prompt, seed)
        seconds = time.perf_counter() - began
        counted = memory.bytes if target.device.type == "cuda" else None
        return Made(image, recipe, session.describe(), Actual(seconds, watch.seconds()["denoise"], counted))
