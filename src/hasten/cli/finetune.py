"""`hasten finetune`: trains what quantization has lost back, and writes it to a file."""

from __future__ import annotations

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
    from hasten.search.finetune.recover import FineTuned, Method


@reports_errors
def finetune(
    model: ModelArgument,
    recipe: Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help="Holds the quantizer.")],
    file: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where it goes (.safetensors).")],
    method: Annotated[str, typer.Option(help="lora (adapters) or qat (the weights, through the rounding).")] = "lora",
    minutes: Annotated[float | None, typer.Option(min=0.01, help="Time for training; ends it early.")] = None,
    train: Annotated[int, typer.Option(min=1, help="Steps of training.")] = 500,
    pictures: Annotated[int, typer.Option(min=1, help="Pictures of the plain model that are learnt from.")] = 512,
    visits: Annotated[int, typer.Option(min=1, help="Sampling steps of these pictures.")] = 8,
    batch: Annotated[int, typer.Option(min=1, help="Pictures in one call of the model.")] = 4,
    rank: Annotated[int, typer.Option(min=1, help="Rank of adapters.")] = 16,
    rate: Annotated[float | None, typer.Option(help="Learning rate; default: what suits the method.")] = None,
    optimizer: Annotated[str, typer.Option(help="auto, adamw or adamw8bit (bitsandbytes).")] = "auto",
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one prompt a line.")] = None,
    steps: StepsOption = None,
    size: SizeOption = None,
    guidance: GuidanceOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Train a quantized model to answer as the plain one does; the more different prompts, the better."""
    from hasten.core.expression import load_recipe
    from hasten.measure.progress import OnTerminal
    from hasten.models import load
    from hasten.search.finetune import finetune as train_model
    from hasten.search.finetune.learning import Training

    applied = load_recipe(recipe)
    quiet()
    loaded = load(model, device=device, dtype=dtype)
    chosen = read_prompts(prompts) if prompts else loaded.workload.prompts
    workload = adjusted(loaded.workload, prompts=chosen, steps=steps, size=size, guidance=guidance)
    training = Training(
        steps=train, minutes=minutes, pictures=pictures, visits=visits, batch=batch, rank=rank, rate=rate,
        optimizer=optimizer,
    )  # fmt: skip
    with OnTerminal(out) as progress:
        made = train_model(
            loaded.pipeline, applied, file, method=cast("Method", method), workload=workload, training=training,
            progress=progress,
        )  # fmt: skip
    for line in _told(made, model):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def _told(made: FineTuned, model: str) -> list[str]:
    lines = [
        f"{made.trained:,} numbers trained in {len(made.losses)} steps ({made.seconds:.0f} s): the denoiser's outputs "
        f"err by {made.loss_after:.0%} (squared) of what they did.",
        f"Written to {made.file}.",
    ]
    if made.method == "lora":
        return [*lines, f"See what it gives: hasten compare {model} -r '{made.recipe}'"]
    return [*lines, "Put it into the plain model with hasten.search.finetune.install(pipeline, file), then quantize."]
