"""`hasten generate`: one picture with a recipe applied."""

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.common import (
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    ModelArgument,
    SizeOption,
    StepsOption,
    adjusted,
    out,
    quiet,
    reports_errors,
)


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
) -> None:
    """Make one picture with a recipe applied, and say what the recipe did."""
    from hasten.core.expression import load_recipe
    from hasten.core.files import atomic_write_bytes, ensure_writable
    from hasten.core.session import accelerate
    from hasten.measure.rendering import render
    from hasten.models import load

    applied = load_recipe(recipe)
    ensure_writable(file.parent)
    quiet()
    loaded = load(model, device=device, dtype=dtype)
    workload = adjusted(loaded.workload, prompts=(prompt,), steps=steps, size=size, guidance=guidance)
    with accelerate(loaded.pipeline, applied) as session:
        began = time.perf_counter()
        image = render(loaded.pipeline, workload, prompt, seed)
        seconds = time.perf_counter() - began
        summary = session.describe()
    buffer = BytesIO()
    image.save(buffer, "PNG")
    atomic_write_bytes(file, buffer.getvalue())
    if applied.techniques:
        out.print(summary, highlight=False, markup=False)
    out.print(f"{file.resolve()}  ({image.width}x{image.height}, {seconds:.2f} s)", soft_wrap=True, highlight=False)
