"""`hasten convert` and `hasten verify`: files of weights from format to format, and what is in them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from hasten.cli.common import out, quiet, reports_errors

if TYPE_CHECKING:
    from hasten.formats.converting import Conversion
    from hasten.formats.verifying import Verified


class Weights:
    """A progress bar over the weights of a file; use it as a context manager."""

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("weights"))
        self._bar = Bar(
            *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
        )
        self._task: TaskID | None = None

    def start(self, weights: int) -> None:
        """Show the bar."""
        self._task = self._bar.add_task("reading", total=weights)

    def advance(self, name: str) -> None:
        """One weight more."""
        if self._task is not None:
            self._bar.update(self._task, advance=1, description=name[-44:])

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


@reports_errors
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A file of weights in any format that hasten reads.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.")],
    layout: Annotated[str, typer.Option("--format", "-f", metavar="NAME", help="Of the file to write.")],
    kind: Annotated[
        str | None,
        typer.Option("--type", metavar="KIND", help="Code all weights as this; default: keep what OUT can hold."),
    ] = None,
    keys: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Names of the weights: original or diffusers; default: as in IN."),
    ] = None,
    architecture: Annotated[str, typer.Option(help="Whose weights they are; auto: as their names say.")] = "auto",
    rotate: Annotated[
        bool, typer.Option("--rotate", help="Recode to 8-bit integers by row behind a Hadamard rotation.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted conversion.")] = False,
) -> None:
    """Convert a file of weights to another format, one weight at a time; exactly, where the format can hold them."""
    from hasten.formats.converting import Order
    from hasten.formats.converting import convert as run

    quiet()
    order = Order(
        source=source.expanduser(), target=target.expanduser(), format=layout, kind=kind, keys=keys,
        architecture=architecture, rotate=rotate, resume=resume,
    )  # fmt: skip
    with Weights(out) as progress:
        try:
            done = run(order, progress)
        except KeyboardInterrupt:
            out.print("What has been coded is kept; the same command with --resume goes on.", soft_wrap=True)
            raise
    out.print(_summary(done, order.source, order.target), highlight=False, markup=False, soft_wrap=True)


def _summary(done: Conversion, source: Path, target: Path) -> str:
    from hasten.formats.converting import size_of

    before, after = (size_of(path) / 2**20 for path in (source, target))
    taken = f", {done.resumed} of them taken over from the interrupted conversion" if done.resumed else ""
    left = (
        f"\n{done.left_out} entries of other networks, or that are not needed, were left out." if done.left_out else ""
    )
    return (
        f"{done.kept} weights kept exactly, {done.coded} plain ones coded or cast, {done.recoded} recoded{taken}.\n"
        f"{before:.2f} MiB -> {after:.2f} MiB: {target}{left}\nsha256 {done.sha256}"
    )


@reports_errors
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A file of weights in any format that hasten reads.")],
    sha256: Annotated[str | None, typer.Option(metavar="HEX", help="The checksum it should have.")] = None,
) -> None:
    """Read a file of weights as a whole, check its numbers and its checksum, and show what is in it."""
    from hasten.core.errors import HastenError
    from hasten.formats.verifying import verify as run

    quiet()
    path = file.expanduser()
    with Weights(out) as progress:
        found = run(path, progress, sha256=sha256)
    out.print(_table(found))
    compared = f"The checksum is that of {found.checksum}." if found.checksum else "There was no checksum to compare."
    if found.problems:
        shown = "; ".join(found.problems[:5])
        more = f"; and {len(found.problems) - 5} more" if len(found.problems) > 5 else ""
        raise HastenError(f"{path} is damaged: {shown}{more}.")
    out.print(f"All numbers are finite. {compared}", highlight=False, soft_wrap=True)


def _table(found: Verified) -> Table:
    table = Table(title=f"format {found.format}", title_justify="left")
    for name in ("codes", "weights", "numbers", "MiB", "bits"):
        table.add_column(name, justify="left" if name == "codes" else "right")
    for name, row in sorted(found.rows.items(), key=lambda item: -item[1].nbytes):
        table.add_row(name, str(row.weights), f"{row.numbers:,}", f"{row.nbytes / 2**20:.2f}", f"{row.bits:.2f}")
    return table
