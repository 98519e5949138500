"""What the commands share: errors as one sentence, options, and loading a model quietly."""

from __future__ import annotations

import functools
import logging
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console

from hasten.core.errors import HastenError
from hasten.core.workload import Workload

if TYPE_CHECKING:
    from hasten.core.recipe import Recipe
    from hasten.models import LoadedModel

P = ParamSpec("P")
R = TypeVar("R")

out = Console()
err = Console(stderr=True)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A bundled model (emoji-flux, emoji-sd, emoji-dit), folder or hub id.")
]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, float16 or bfloat16; default: float32 on a CPU, bfloat16 on a GPU.")
]
RecipeOption = Annotated[
    list[str] | None,
    typer.Option(
        "--recipe", "-r", metavar="RECIPE",
        help='A technique, a .toml file or an expression: -r "FirstBlockCache(threshold=0.1) | CompileBlocks()".',
    ),
]  # fmt: skip
StepsOption = Annotated[int | None, typer.Option(help="Denoising steps.")]
SizeOption = Annotated[str | None, typer.Option(metavar="WxH", help="Size of the pictures in pixels: 1024x1024.")]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="If MODEL is a file of weights: the pipeline that it goes into."),
]
FallbackOption = Annotated[
    bool, typer.Option("--fallback", help="Where memory runs out, go on with the next recipe that needs less.")
]
GuidanceOption = Annotated[float | None, typer.Option(help="Guidance scale.")]


def reports_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Show what a user can mend as one sentence with exit code 2; Ctrl-C ends with 130."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except HastenError as error:
            err.print(f"[bold red]hasten:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(2) from None
        except KeyboardInterrupt:
            err.print("interrupted", style="yellow")
            raise typer.Exit(130) from None

    return guarded


def quiet() -> None:
    """Keep the libraries' own warnings and bars out of the output."""
    warnings.filterwarnings("ignore")
    for name in ("diffusers", "transformers", "torch", "torchmetrics", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()


def adjusted(
    workload: Workload,
    *,
    prompts: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (),
    steps: int | None = None,
    size: str | None = None,
    guidance: float | None = None,
) -> Workload:
    """The model's default workload with what the user asked for."""
    width, height = parse_size(size) if size else (workload.width, workload.height)
    return workload.replace(
        prompts=prompts or workload.prompts,
        seeds=seeds or workload.seeds,
        steps=steps if steps is not None else workload.steps,
        width=width,
        height=height,
        guidance=guidance if guidance is not None else workload.guidance,
    )


def parse_size(text: str) -> tuple[int, int]:
    """Read `1024x768` (or `512` for a square)."""
    found = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    if not found:
        raise HastenError(f"--size {text!r} is no size; write it as 1024x1024.")
    return int(found[1]), int(found[2] or found[1])


def read_prompts(file: Path) -> tuple[str, ...]:
    """Read prompts from a text file, one a line; empty lines and lines that begin with # are left out."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise HastenError(f"Cannot read the prompts file {file}: {error}.") from None
    prompts = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not prompts:
        raise HastenError(f"The prompts file {file} holds no prompt.")
    return prompts


def gather_statistics(model: LoadedModel, recipes: Iterable[Recipe]) -> None:
    """Gather the statistics that techniques of the recipes look for, unless that was done before."""
    from hasten.measure.progress import OnTerminal
    from hasten.search.quantization.collect import collect, lacks_statistics

    if lacks_statistics(recipes, model.pipeline):
        out.print("Watching a few pictures first, once for this model: a recipe needs statistics of its layers.")
        with OnTerminal(out) as progress:
            collect(model, progress=progress)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")
