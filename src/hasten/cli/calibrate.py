"""`hasten calibrate`: measures what a technique needs to know about a model. One entry of `PURPOSES` a purpose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

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
    read_prompts,
    reports_errors,
)

if TYPE_CHECKING:
    from hasten.core.workload import Workload
    from hasten.models import LoadedModel


@dataclass(frozen=True)
class Job:
    """A model, the pictures to make with it, and where the result goes."""

    model: LoadedModel
    workload: Workload
    file: Path | None
    """None for the usual place, where the purpose has one."""
    goal: str = "reproduce"
    recipe: str = ""


def _signals(job: Job, purpose: str) -> None:
    from hasten.measure.progress import OnTerminal
    from hasten.search.calibrate_signals import calibrate as measure
    from hasten.search.calibrate_signals import check_file

    kind = "teacache" if purpose == "teacache" else "magcache"
    file = cast(Path, job.file)
    check_file(file, kind)
    with OnTerminal(out) as progress:
        found = measure(job.model, kind, job.workload, progress)
    found.save(file)
    out.print(f"{found.name}: {found.summary}.", highlight=False, markup=False, soft_wrap=True)
    for warning in found.warnings:
        out.print(f"Warning: {warning}.", style="yellow", highlight=False, markup=False, soft_wrap=True)
    technique, parameter = ("TeaCache", "coefficients") if kind == "teacache" else ("MagCache", "ratios")
    usage = f"-r '{technique}({parameter}=\"{file}\")'"
    out.print(f"Use it with {usage}", highlight=False, markup=False, soft_wrap=True)


def _plan(job: Job, purpose: str) -> None:
    from hasten.core.errors import UnknownName
    from hasten.core.expression import load_recipe
    from hasten.measure.progress import OnTerminal
    from hasten.search.calibrate import GOALS, calibrate_plan
    from hasten.search.plan_table import plan_table, solver_answers

    if job.goal not in GOALS:
        raise UnknownName("goal of a plan", job.goal, GOALS)
    file = cast(Path, job.file)
    recipe = load_recipe(job.recipe) if job.recipe else None
    with OnTerminal(out) as progress:
        found = calibrate_plan(
            job.model, job.workload, goal=GOALS[job.goal], recipe=recipe, file=file, progress=progress
        )  # fmt: skip
    out.print(plan_table(found))
    for answer in solver_answers(found):
        out.print(answer, highlight=False, markup=False, soft_wrap=True)
    out.print(f"Use it with -r 'PlannedCache(plan=\"{file}\", speedup=2)'", highlight=False, soft_wrap=True)


def _statistics(job: Job, purpose: str) -> None:
    from hasten.measure.progress import OnTerminal
    from hasten.quantize.engine.statistics_file import StatisticsFile
    from hasten.search.quantization.collect import collect

    with OnTerminal(out) as progress:
        file = collect(job.model, job.workload, file=job.file, progress=progress)
    found = StatisticsFile(file)
    layers, inputs, size = len(found.statistics.layers), len(found.counts), file.stat().st_size / 2**20
    out.print(f"{layers} layers with {inputs} different inputs were watched; {size:.1f} MiB: {file}", soft_wrap=True)
    given = f'statistics="{file}"' if job.file else ""
    out.print(f"Use it with -r 'SVDQuant({given})', or GPTQ, AWQ, SmoothQuant.", highlight=False, soft_wrap=True)


def _precision(job: Job, purpose: str) -> None:
    from hasten.measure.progress import OnTerminal
    from hasten.search.quantization.sensitivity import agreement, measure_gains

    with OnTerminal(out) as progress:
        file, found = measure_gains(job.model, job.workload, file=job.file, progress=progress)
    told = agreement(found)
    out.print(f"{told['layers']} layers were tried: {file}", highlight=False, soft_wrap=True)
    out.print(
        f"What statistics foretell and what was measured rank layers alike to {told['rank_correlation']:.2f}; "
        f"most sensitive: {', '.join(told['most_sensitive'])}",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    given = f'plan="{file}"' if job.file else ""
    out.print(f"Use it with -r 'MixedPrecision({given})'", highlight=False, soft_wrap=True)


PURPOSES: dict[str, Callable[[Job, str], None]] = {
    "plan": _plan,
    "teacache": _signals,
    "magcache": _signals,
    "statistics": _statistics,
    "precision": _precision,
}
"""What can be calibrated, and what does it. Progress and results go to the terminal."""


@reports_errors
def calibrate(
    model: ModelArgument,
    file: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where it goes; other models in it are kept. Statistics go to the user's cache by default.",
        ),
    ] = None,
    purpose: Annotated[str, typer.Option("--for", metavar="WHAT", help=f"One of {', '.join(PURPOSES)}.")] = "plan",
    goal: Annotated[
        str, typer.Option(help="Of a plan: reproduce the plain pictures, or converge to those of many steps.")
    ] = "reproduce",
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="RECIPE", help="What runs underneath a plan, as it will later.")
    ] = "",
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one prompt a line.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="How many of the model's own prompts are used.")] = 8,
    steps: StepsOption = None,
    size: SizeOption = None,
    guidance: GuidanceOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Make a few uncached pictures, measure what a technique needs to know about the model, and write it to a file."""
    from hasten.core.errors import HastenError, UnknownName
    from hasten.core.files import ensure_writable
    from hasten.formats.loading import load

    if purpose not in PURPOSES:
        raise UnknownName("purpose of calibration", purpose, PURPOSES)
    if file is not None:
        ensure_writable(file.parent)
    elif purpose not in ("statistics", "precision"):
        raise HastenError("Say with -o FILE where the result goes.")
    quiet()
    loaded = load(model, device=device, dtype=dtype)
    chosen = read_prompts(prompts) if prompts else loaded.workload.prompts[:pictures]
    workload = adjusted(loaded.workload, prompts=chosen, steps=steps, size=size, guidance=guidance)
    PURPOSES[purpose](Job(loaded, workload, file, goal, recipe), purpose)
