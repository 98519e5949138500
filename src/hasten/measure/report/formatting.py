"""Numbers and words shared by the terminal table and the HTML report, in plain ASCII."""

from __future__ import annotations

import math
from pathlib import PurePosixPath, PureWindowsPath

from hasten.measure.comparison import Comparison, FidelityRecord, Row, Steps

NOTHING = "-"


def seconds(value: float | None) -> str:
    """Seconds with three significant digits and no exponent: `0.183`, `2.29`, `24.1`, `132`."""
    if value is None:
        return NOTHING
    if value < 0.0005:
        return "<0.001" if value else "0"
    digits = min(3, max(0, 2 - math.floor(math.log10(value))))
    return f"{value:.{digits}f}"


def setup(value: float | None) -> str:
    """Seconds of set-up with one digit, `0.3`, `41.5`, `132`."""
    if value is None:
        return NOTHING
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}"


def spread(row: Row) -> str:
    """The range of the timed runs, `2.21-2.40`."""
    timing = row.seconds_per_image
    if timing is None:
        return NOTHING
    if len(timing.runs) < 2:
        return "timed once"
    return f"{seconds(timing.min)}-{seconds(timing.max)}"


def speedup(value: float | None, times: str = "x") -> str:
    """A factor, `1.84x`; a `times` sign of choice."""
    return NOTHING if value is None else f"{value:.2f}{times}"


def memory(size: int | None) -> str:
    """Bytes in MiB, or GiB from 1 GiB on."""
    if size is None:
        return NOTHING
    mebibytes = size / 2**20
    if mebibytes >= 1000:
        return f"{seconds(mebibytes / 1024)} GiB"
    return f"{mebibytes:.0f} MiB" if mebibytes >= 10 or not size else f"{mebibytes:.1f} MiB"


def count(value: float) -> str:
    """A whole number, or a mean with one digit."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def steps(value: Steps | None) -> str:
    """Steps computed in full and reused: `11/17`."""
    return NOTHING if value is None else f"{count(value.full)}/{count(value.reused)}"


def psnr(value: FidelityRecord | None) -> str:
    """PSNR in dB with one digit, or the word for an infinite one."""
    if value is None:
        return NOTHING
    return "identical" if value.psnr is None else f"{value.psnr:.1f}"


def ratio(value: float | None) -> str:
    """SSIM or LPIPS with three digits that never round to perfection."""
    if value is None:
        return NOTHING
    text = f"{value:.3f}"
    if text == "1.000" and value < 1:
        return ">.999"
    return "<.001" if text == "0.000" and value > 0 else text


def engaged(row: Row) -> str:
    """Whether the recipe proved that it took effect."""
    if row.status in ("refused", "failed"):
        return row.status
    if row.kind != "recipe":
        return NOTHING
    return "yes" if row.engaged else "no evidence"


def memory_note(comparison: Comparison) -> str:
    """What the memory column measures: as recorded, otherwise what is usual on that device."""
    recorded = comparison.environment.get("peak_memory")
    if recorded is not None:
        return str(recorded)
    if comparison.workload.device.startswith("cpu"):
        return "growth of the process's resident memory"
    return f"memory allocated on {comparison.workload.device}"


def lpips_note(comparison: Comparison) -> str:
    """At which resolution LPIPS compared the images, if that was recorded."""
    sizes = {row.fidelity.lpips_resolution for row in comparison.rows if row.fidelity} - {None}
    return f"LPIPS at {', '.join(map(str, sorted(map(int, filter(None, sizes)))))} px" if sizes else ""


def model_name(model: str) -> str:
    """A hub id or bundled name as it is, a path by its last part."""
    path = PureWindowsPath(model) if "\\" in model else PurePosixPath(model)
    return path.name or model if path.is_absolute() or model.startswith((".", "~")) else model


def plural(number: int, noun: str) -> str:
    """`1 image`, `2 images`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def one_line(text: str) -> str:
    """The text without line breaks and control characters, which would upset a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())
