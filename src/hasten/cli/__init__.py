"""The command line: `hasten compare`, `generate`, `inspect`, `plan`, `calibrate`, `quantize`, `convert` and others."""

from __future__ import annotations

import typer

from hasten.cli import calibrate, compare, convert, doctor, finetune, generate, inspect, plan, quantize, techniques

app = typer.Typer(
    name="hasten",
    help="Accelerate diffusion models, and see what each change did to time, memory and the picture.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compare")(compare.compare)
app.command("generate")(generate.generate)
app.command("inspect")(inspect.inspect)
app.command("techniques")(techniques.techniques)
app.command("plan")(plan.plan)
app.command("calibrate")(calibrate.calibrate)
app.command("convert")(convert.convert)
app.command("verify")(convert.verify)
app.command("quantize")(quantize.quantize)
app.command("finetune")(finetune.finetune)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Entry point of the console script."""
    app()
