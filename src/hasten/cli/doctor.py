"""`hasten doctor`: what works on this machine, each thing tried."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Column, Table

from hasten.cli.common import DeviceOption, out, quiet, reports_errors
from hasten.core.errors import HastenError

if TYPE_CHECKING:
    import torch

    from hasten.core.diagnosis import Finding

_COLOURS = {"usable": "green", "unfit": "dim", "missing": "yellow", "too old": "yellow", "broken": "bold red"}


@reports_errors
def doctor(
    device: DeviceOption = None,
    json: Annotated[Path | None, typer.Option(help="Also write the findings to this file.")] = None,
) -> None:
    """Try every kernel, back-end and optional package, and say what is usable and what to do about the rest.

    Each is tried in another process and compared with plain mathematics, so a crash is a line of the table. `unfit`
    means sound, but made for other hardware.
    """
    from hasten.core.files import atomic_write_text, json_text
    from hasten.measure.environment import environment

    quiet()
    place = _device(device)
    facts = environment(place)
    out.print(", ".join(f"{name} {value}" for name, value in facts.items() if name != "peak_memory"), highlight=False)
    with out.status("trying each kernel and package; this takes a minute"):
        found = _all(place)
    out.print(_table(found))
    out.print(_summary(found), highlight=False)
    if json is not None:
        atomic_write_text(json, json_text({"environment": facts, "findings": [asdict(one) for one in found]}))


def _device(text: str | None) -> torch.device:
    import torch

    try:
        place = torch.device(text or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError) as error:
        raise HastenError(f"--device {text}: {' '.join(str(error).split())}") from None
    return place


def _all(place: torch.device) -> list[Finding]:
    from hasten.core import packages
    from hasten.core.diagnosis import findings
    from hasten.core.registry import FAMILIES

    return [*packages.diagnose(place), *findings(FAMILIES, place)]


def _table(found: list[Finding]) -> Table:
    columns = (Column(name, overflow="fold") for name in ("what", "name", "state", "detail"))
    table = Table(*columns, title="Findings", title_justify="left")
    for one in found:
        state = f"[{_COLOURS[one.status]}]{one.status}[/]"
        table.add_row(one.kind, one.name, state, escape(one.detail))
    return table


def _summary(found: list[Finding]) -> str:
    counts = {status: sum(one.status == status for one in found) for status in _COLOURS}
    return ", ".join(f"{count} {status}" for status, count in counts.items() if count)
