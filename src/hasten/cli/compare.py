"""`hasten compare`: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hasten.cli.common import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    FallbackOption,
    GuidanceOption,
    ModelArgument,
    RecipeOption,
    SizeOption,
    StepsOption,
    adjusted,
    gather_statistics,
    out,
    quiet,
    read_prompts,
    reports_errors,
)
from hasten.models import DEFAULT

DEFAULT_PROMPTS = 4
"""How many of the model's own prompts are used when none is given."""


@reports_errors
def compare(
    model: ModelArgument = DEFAULT,
    recipe: RecipeOption = None,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt (class name for DiT); repeat for several.")] = None,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one prompt a line.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt, with seeds 0, 1, ...")] = 1,
    steps: StepsOption = None,
    size: SizeOption = None,
    guidance: GuidanceOption = None,
    budget: Annotated[
        str | None, typer.Option(help="Put all caches at the same number of full steps: 2x, or a number of steps.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Time each picture so many times.")] = 1,
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of the report.")] = Path("hasten-report"),
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    fewer_steps: Annotated[
        bool, typer.Option(help="Add rows with fewer steps, and with a better solver, at the same time.")
    ] = True,
    fallback: FallbackOption = False,
    base_model: BaseOption = None,
) -> None:
    """Run recipes on the same prompts and seeds; write a table, report.html and comparison.json.

    Without arguments: the bundled emoji-flux model with a ladder of recipes, no network and no GPU needed.
    """
    from hasten.core.expression import load_recipe
    from hasten.core.files import ensure_writable
    from hasten.core.recipe import Recipe
    from hasten.measure.compare import compare as run
    from hasten.measure.defaults import default_recipes
    from hasten.measure.progress import OnTerminal
    from hasten.search.actual import comparison_against
    from hasten.search.fallback import Adviser, load_or_park, rescuer

    wanted = [(text, load_recipe(text)) for text in recipe or ()]
    given = (*(prompt or ()), *(read_prompts(prompts) if prompts else ()))
    ensure_writable(folder)
    quiet()
    loaded, parked = load_or_park(model, base=base_model, device=device, dtype=dtype, fallback=fallback)
    workload = adjusted(
        loaded.workload,
        prompts=given or loaded.workload.prompts[:DEFAULT_PROMPTS],
        seeds=tuple(range(seeds)),
        steps=steps,
        size=size,
        guidance=guidance,
    )
    recipes = wanted or default_recipes(loaded)
    if not parked:
        gather_statistics(loaded, (one for _, one in recipes))
    adviser = Adviser.of(loaded.pipeline, workload, parked=parked)
    base = adviser.enough(Recipe()) if parked else Recipe()
    with OnTerminal(out) as progress:
        result = run(
            loaded.pipeline, recipes, workload,
            runs=runs, out=folder, fewer_steps=fewer_steps, progress=progress, title=loaded.name, budget=budget,
            rescue=rescuer(adviser, fallback=fallback), base=base,
        )  # fmt: skip
    out.print(result.table())
    if lines := comparison_against(loaded.pipeline, result, recipes):
        out.print("\nPredicted against actual\n" + "\n".join(lines), highlight=False, markup=False)
    out.print(f"\nReport: {(folder / 'report.html').resolve()}", soft_wrap=True, highlight=False)
    if result.incomplete:
        raise typer.Exit(130)
