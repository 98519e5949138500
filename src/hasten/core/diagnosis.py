"""What works on this machine and what does not: findings that each family contributes to `hasten doctor`."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, cast

import torch

from hasten.core.errors import HastenError

Status = Literal["usable", "unfit", "missing", "too old", "broken"]
"""`unfit` means sound but made for other hardware or types; `broken` means tried or loaded, with an error."""


@dataclass(frozen=True)
class Obstacle:
    """Why something cannot be used: what kind of reason, and a sentence without a full stop."""

    status: Status
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report: what was looked at, its state, and what was seen or is to be done."""

    kind: str
    name: str
    status: Status
    detail: str


Diagnose = Callable[[torch.device], Iterator[Finding]]
"""What a family's package may export under the name `diagnose`."""


def findings(families: tuple[str, ...], device: torch.device) -> Iterator[Finding]:
    """Everything the families find on a device; a family that fails itself is a finding, never an error."""
    for name in families:
        try:
            module = importlib.import_module(f"hasten.{name}")
            diagnose = cast("Diagnose | None", getattr(module, "diagnose", None))
            yield from diagnose(device) if diagnose else ()
        except Exception as error:  # noqa: BLE001 - the doctor must outlive whatever it meets
            yield Finding(kind=name, name=name, status="broken", detail=in_words(error))


def in_words(error: BaseException, longest: int = 300) -> str:
    """An error in one line: its text alone for our own, with its class for others'."""
    text = " ".join(str(error).split()) or "no message"
    shown = text if len(text) <= longest else f"{text[:longest].rstrip()}..."
    return shown if isinstance(error, HastenError) else f"{type(error).__name__}: {shown}"
