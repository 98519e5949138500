"""`hasten plan`: predicted time and memory of recipes, before anything is loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hasten.cli.common import GuidanceOption, SizeOption, StepsOption, adjusted, out, quiet, reports_errors
from hasten.core.errors import HastenError

if TYPE_CHECKING:
    from hasten.search.predict import MemoryPlan, Prediction
    from hasten.search.prediction.devices import Device

_USUAL = "rtx4090"
"""The device to plan for where none is named and this machine has no GPU."""
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@reports_errors
def plan(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="A released model (FLUX.1-dev), a bundled one, or a folder.")
    ],
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory to stay within: 12GB; default: what the device has.")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="h200, rtx4090 ..., or here (measured in 20 seconds); default: this machine's GPU, or rtx4090."
        ),
    ] = None,
    size: SizeOption = None,
    steps: StepsOption = None,
    guidance: GuidanceOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every recipe, also those that are refused.")] = False,
) -> None:
    """Predict memory and time per recipe from the configuration alone, and pick the fastest recipe that fits.

    Nothing is loaded or downloaded. Predictions are for one picture after the first; compiling is not included.
    """
    from hasten.models import dtype_named
    from hasten.search.predict import plan as make_plan
    from hasten.search.predict import profile
    from hasten.search.prediction.model import planned_model

    limit = parse_bytes(memory) if memory else None
    quiet()
    found = _device(device)
    on_cpu = found.name == "cpu" or not found.overlaps
    planned = planned_model(model, dtype_named(dtype or ("float32" if on_cpu else "bfloat16")))
    workload = adjusted(planned.workload, steps=steps, size=size, guidance=guidance)
    made = make_plan(profile(planned, workload), found, limit)
    out.print(_heading(made), highlight=False, soft_wrap=True)
    out.print(_parts(made))
    out.print(_recipes(made, everything=everything))
    for line in _verdict(made):
        out.print(line, highlight=False, markup=False, soft_wrap=True)


def parse_bytes(text: str) -> int:
    """Read a size such as `12GB` (10^9 bytes), `11.5GiB` (2^30) or a number of bytes."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", text.strip().upper())
    if not found or found[2] == "I" or not float(found[1]):
        raise HastenError(f"{text!r} is no size of memory; write it as 12GB or 11.5GiB.")
    return int(float(found[1]) * _UNITS[found[2]])


def _device(name: str | None) -> Device:
    import torch

    from hasten.search.prediction.devices import find_device
    from hasten.search.prediction.here import device_here, measure_device

    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "here":
        out.print("Measuring this machine, for about 20 seconds ...", style="dim")
        return measure_device(here)
    if name is not None:
        return find_device(name)
    if found := device_here(here):
        return found
    if here.type == "cuda":
        raise HastenError("Nothing is known of this GPU; measure it with --device here, or name one, such as h200.")
    return find_device(_USUAL)


def _heading(made: MemoryPlan) -> str:
    from hasten.search.prediction.calls import size

    found, device = made.profile, made.device
    width, height = size(found.model, found.workload)
    dtype = str(found.model.dtype).removeprefix("torch.")
    return (
        f"[bold]{found.model.name}[/], {width}x{height}, {found.workload.steps} steps, {dtype}, on {device.title} "
        f"({device.basis}), within {made.limit / 2**30:.1f} GiB, "
        f"of which {device.reserve / 2**30:.1f} are left to the driver"
    )


def _parts(made: MemoryPlan) -> Table:
    from hasten.search.predict import predict

    plain = predict(made.profile, made.device)
    table = Table("component", "weights", "activations", "time a picture", title="Components", title_justify="left")
    for name, part in made.profile.parts.items():
        table.add_row(name, _gib(part.weights), _gib(part.activations), _seconds(plain.phases.get(name)))
    weights = sum(part.weights for part in made.profile.parts.values())
    table.add_row("together", _gib(weights), f"peak {_gib(plain.memory or 0)}", _seconds(plain.seconds))
    return table


def _recipes(made: MemoryPlan, *, everything: bool) -> Table:
    shown = list(made.predictions) if everything else made.front
    table = Table("recipe", "peak", "fits", "a step", "a picture", "gives up", title="Recipes", title_justify="left")
    for one in sorted(shown, key=lambda p: (p.seconds is None, p.seconds or 0.0)):
        if one.refusals:
            table.add_row(str(one.recipe), "", "refused", "", "", " ".join(one.refusals), style="dim")
            continue
        table.add_row(
            f"[bold]{one.recipe}[/]" if one is made.pick else str(one.recipe),
            _gib(one.memory or 0),
            "yes" if made.fits(one) else "no",
            _seconds(one.step_seconds),
            _seconds(one.seconds),
            one.gives_up,
        )
    return table


def _verdict(made: MemoryPlan) -> list[str]:
    pick, faster = made.pick, made.faster
    if pick is None:
        least = min((p.memory for p in made.predictions if p.memory is not None), default=0)
        return [f"Nothing fits; the least that any of these recipes needs is {_gib(least + made.device.reserve)}."]
    lines = [f"Pick: {pick.recipe} - {_gib(pick.memory or 0)}, {_seconds(pick.seconds)} a picture. {_price(pick)}"]
    if faster is not None and faster is not pick:
        lines.append(f"Faster still, but the picture may change: {faster.recipe} - {_seconds(faster.seconds)}.")
    return lines


def _price(pick: Prediction) -> str:
    lost = [pick.gives_up] if pick.gives_up else []
    lost += ["the picture may change"] if pick.lossy else []
    return f"Given up: {'; '.join(lost)}." if lost else "Nothing is given up."


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def _seconds(value: float | None) -> str:
    if value is None:
        return "only a run can tell"
    return f"{value:.2f} s" if value >= 1 else f"{1e3 * value:.3g} ms"
