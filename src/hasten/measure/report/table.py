"""The comparison as a table for the terminal: readable from 80 columns on, without colour, in ASCII."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from hasten.measure.comparison import Comparison, FidelityRecord, Row
from hasten.measure.report import formatting as fmt
from hasten.measure.report.names import readable
from hasten.measure.report.verdict import Closeness, closeness, is_faster, noise_floor

_STYLES: dict[Closeness, str] = {
    "identical": "green",
    "none": "green",
    "invisible": "green",
    "slight": "",
    "visible": "yellow",
    "strong": "red",
    "unknown": "dim",
}
_NUMBERS = (
    "s/image\nrange",
    "speed-\nup",
    "set-up s\npays off",
    "peak\nmemory",
    "full/\nreused",
    "PSNR dB\ndiffers",
    "SSIM",
    "LPIPS",
)
_NARROW = (
    "s/image\nrange",
    "speed-up\nset-up s\npays off",
    "peak\nmemory",
    "full/\nreused",
    "PSNR dB\ndiffers",
    "SSIM\nLPIPS",
)
_WIDE = 96  # columns from which every figure has a column of its own


def render_table(comparison: Comparison) -> Table:
    """Lay out the results; rows that did not run say why below, over the whole width."""
    whole = Table.grid(expand=False)
    whole.add_column()
    whole.add_row(_Results(comparison))
    explained = [row for row in comparison.rows if row.reason]
    for row in explained:
        whole.add_row(_reason(row, "\n" if row is explained[0] else ""))
    whole.add_row(_notes(comparison))
    return whole


class _Results:
    """The rows, one figure a column; where that does not fit, some columns hold two figures."""

    def __init__(self, comparison: Comparison) -> None:
        rows = [_cells(row, comparison) for row in comparison.rows]
        self.wide = _laid_out(_NUMBERS, rows, gap=1)
        self.narrow = _laid_out(_NARROW, [_narrowed(cells) for cells in rows], gap=0)

    def _fitting(self, options: ConsoleOptions) -> Table:
        return self.wide if options.max_width >= _WIDE else self.narrow

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self._fitting(options)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options, self._fitting(options))


def _laid_out(numbers: Sequence[str], rows: Sequence[list[Text]], gap: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0), show_edge=False)
    table.add_column("recipe", overflow="fold", min_width=16)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("engaged", min_width=7)
    for cells in rows:
        table.add_row(*cells)
    return table


def _narrowed(cells: list[Text]) -> list[Text]:
    """Speed-up above set-up, and SSIM above LPIPS."""
    if len(cells) < len(_NUMBERS):
        return cells
    name, time, speedup, setup, memory, steps, psnr, ssim, lpips, engaged = cells
    return [name, time, _stacked(speedup, setup), memory, steps, psnr, _stacked(ssim, lpips), engaged]


def _stacked(upper: Text, lower: Text) -> Text:
    return Text("\n").join([upper, lower])


def _cells(row: Row, comparison: Comparison) -> list[Text]:
    name = Text(readable(row.name), style="bold" if row.kind == "recipe" else "")
    if row.status in ("refused", "failed"):
        return [name, Text(row.status, style="red" if row.status == "failed" else "yellow")]
    found, word = row.fidelity, closeness(row)
    faster = "bold green" if is_faster(row, comparison.baseline) else ""
    return [
        name,
        _two_lines(fmt.seconds(row.seconds_per_image and row.seconds_per_image.median), fmt.spread(row)),
        Text(fmt.speedup(row.speedup), style=faster),
        _two_lines(fmt.setup(row.setup_seconds), _pays_off(row)),
        Text(fmt.memory(row.peak_memory_bytes)),
        Text(fmt.steps(row.steps)),
        _two_lines(fmt.psnr(found), word if found and not found.identical else "", _STYLES[word]),
        Text(fmt.ratio(found.ssim if found else None)),
        Text(fmt.ratio(found.lpips if found else None)),
        Text(fmt.engaged(row)),
    ]


def _two_lines(first: str, second: str, style: str = "dim") -> Text:
    if second in ("", fmt.NOTHING):
        return Text(first)
    return Text.assemble(first, "\n", (second, style))


def _pays_off(row: Row) -> str:
    after = row.pays_off_after_images
    return "" if not after else f"after {after}"


def _reason(row: Row, before: str) -> Text:
    style = "red" if row.status == "failed" else "yellow"
    name, reason = readable(row.name), fmt.one_line(row.reason or "")
    return Text.assemble(before, (f"{row.status} ", style), (name, "bold"), f": {reason}")


def _floor_note(floor: FidelityRecord | None) -> str:
    if floor is None:
        return "noise floor: not measured"
    return f"noise floor: {fmt.psnr(floor)}" + ("" if floor.identical else " dB")


def _notes(comparison: Comparison) -> Text:
    floor = noise_floor(comparison)
    parts = [
        f"peak memory: {fmt.memory_note(comparison)}",
        "set-up pays off after that many images",
        _floor_note(floor),
        fmt.lpips_note(comparison),
    ]
    text = Text("\n" + "; ".join(part for part in parts if part), style="dim")
    for warning in comparison.warnings:
        text.append(f"\n{warning}", style="not dim yellow")
    if comparison.incomplete:
        text.append("\nIncomplete: stopped before every row had finished.", style="not dim yellow")
    return text
