"""`hasten quantize`: quantizes a model for good, checks its pictures, and saves it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hasten.cli.common import (
    DeviceOption,
    DtypeOption,
    GuidanceOption,
    ModelArgument,
    SizeOption,
    StepsOption,
    adjusted,
    gather_statistics,
    out,
    quiet,
    read_prompts,
    reports_errors,
)

if TYPE_CHECKING:
    from rich.table import Table

    from hasten.core.recipe import Recipe
    from hasten.search.quantization.gate import Limits, Verdict

ALIASES = {"int8": "Int8Linear", "fp8": "Float8Linear", "int4": "Int4Linear", "bnb": "BitsAndBytes"}
"""Names that people use for techniques, beside the techniques' own in any case."""


@reports_errors
def quantize(
    model: ModelArgument,
    folder: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder of the quantized pipeline.")],
    method: Annotated[str, typer.Option(help="svdquant, gptq, awq, int8, fp8 or another quantizer.")] = "svdquant",
    bits: Annotated[int | None, typer.Option(help="Bits of a code, where the method has a choice.")] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", metavar="RECIPE", help="Instead of --method: a whole recipe.")
    ] = None,
    gate_psnr: Annotated[float | None, typer.Option(help="Least PSNR to the original's pictures, in dB.")] = 25.0,
    gate_ssim: Annotated[float | None, typer.Option(help="Least SSIM.")] = None,
    gate_lpips: Annotated[float | None, typer.Option(help="Greatest LPIPS.")] = None,
    gate: Annotated[bool, typer.Option(help="Check pictures, and give the worst layers more bits.")] = True,
    back_off: Annotated[int, typer.Option(min=0, help="How often layers may get more bits.")] = 4,
    prompts: Annotated[Path | None, typer.Option(metavar="FILE", help="A file with one prompt a line.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="How many of the model's own prompts are used.")] = 4,
    report: Annotated[Path | None, typer.Option(metavar="FILE", help="Where the report goes as JSON.")] = None,
    steps: StepsOption = None,
    size: SizeOption = None,
    guidance: GuidanceOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Quantize a model, compare its pictures with the original's, and save it; nothing is saved that fails."""
    from hasten.core.expression import load_recipe
    from hasten.core.files import ensure_writable
    from hasten.core.session import apply_permanently
    from hasten.models import load
    from hasten.search.quantization.gate import Limits

    wanted = load_recipe(recipe) if recipe else method_recipe(method, bits)
    save = saver()
    ensure_writable(folder.parent)
    quiet()
    loaded = load(model, device=device, dtype=dtype)
    gather_statistics(loaded, (wanted,))
    chosen = read_prompts(prompts) if prompts else loaded.workload.prompts[:pictures]
    workload = adjusted(loaded.workload, prompts=chosen, steps=steps, size=size, guidance=guidance)
    if gate:
        limits = Limits(psnr=gate_psnr, ssim=gate_ssim, lpips=gate_lpips)
        wanted = _gated(loaded.pipeline, wanted, limits, workload, back_off, report)
    apply_permanently(loaded.pipeline, wanted)
    out.print(f"{save(loaded.pipeline, folder)}: {wanted}", highlight=False, markup=False, soft_wrap=True)


def method_recipe(method: str, bits: int | None) -> Recipe:
    """The recipe of a quantizer by its name in any case, or by a name of common use."""
    from hasten.core.errors import InvalidSetting, UnknownName
    from hasten.core.recipe import Recipe
    from hasten.core.registry import techniques
    from hasten.quantize.engine.linear_quantizer import LinearQuantizer

    known = {name.casefold(): kind for name, kind in techniques().items() if issubclass(kind, LinearQuantizer)}
    known |= {alias: kind for alias, name in ALIASES.items() if (kind := known.get(name.casefold()))}
    if method.casefold() not in known:
        raise UnknownName("method of quantization", method, known)
    kind = known[method.casefold()]
    if bits is not None and "bits" not in kind.settings():
        raise InvalidSetting(f"{kind.__name__} has no choice of bits; leave --bits out.")
    return Recipe((kind.build({} if bits is None else {"bits": bits}),))


def saver() -> Callable[[Any, Path], Path]:
    """What saves a quantized pipeline."""
    from hasten.core.errors import HastenError

    try:
        return cast("Callable[[Any, Path], Path]", importlib.import_module("hasten.formats.saving").save)
    except ImportError:
        raise HastenError("This installation of hasten cannot save quantized pipelines.") from None


def _gated(pipeline: Any, recipe: Recipe, limits: Limits, workload: Any, back_off: int, report: Path | None) -> Recipe:
    from hasten.core.errors import HastenError
    from hasten.core.files import atomic_write_text, json_text
    from hasten.measure.progress import OnTerminal
    from hasten.search.quantization.gate import Gate

    with OnTerminal(out) as progress:
        verdict = Gate(pipeline, workload, limits, progress).run(recipe, rounds=back_off)
    if report:
        atomic_write_text(report, json_text(verdict.to_dict()))
    out.print(table_of(verdict))
    if not verdict.passed:
        reasons = ", ".join(verdict.rounds[-1].missed)
        raise HastenError(f"The gate is not passed ({reasons}), so nothing was saved; use more bits or a lower limit.")
    return verdict.recipe


def table_of(verdict: Verdict) -> Table:
    """One row for each try."""
    from rich.table import Table

    table = Table("Try", "Bits a weight", "PSNR", "SSIM", "LPIPS", "Verdict", "Then")
    for number, one in enumerate(verdict.rounds, 1):
        found = one.fidelity
        values = ("-",) * 3 if found is None else (f"{found.psnr:.2f}", f"{found.ssim:.4f}", f"{found.lpips:.4f}")
        steps = (f"{len(one.finer)} layers to 8 bits" * bool(one.finer), f"{len(one.left)} kept" * bool(one.left))
        told = ", ".join(one.missed) or "passed"
        table.add_row(str(number), f"{one.bits:.2f}", *values, told, ", ".join(filter(None, steps)))
    return table
