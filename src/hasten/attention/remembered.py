"""The user's file of kernels chosen by measurement, one entry per device, versions and shapes."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch

from hasten.attention.call import AttentionCall
from hasten.attention.kernels import KERNELS
from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.packages import installed
from hasten.core.user_cache import user_cache

_FORMAT = 2
"""Changes also where a kernel of ours does, since the times of the other would no longer be its own."""


@dataclass(frozen=True)
class Trial:
    """What came of trying one kernel on a call."""

    kernel: str
    milliseconds: float | None = None
    error: float | None = None
    """Distance from math attention relative to its norm."""
    problem: str | None = None
    """Why it was not chosen from: refused, failed, or too far off."""


@dataclass(frozen=True)
class Choice:
    """The kernel chosen for a call, and everything that was tried."""

    kernel: str
    trials: tuple[Trial, ...]
    recalled: bool = False
    """Was it read from the file instead of measured now?"""


def place() -> Path:
    """The file: `attention.json` in the user's cache folder (see `core.user_cache`)."""
    return user_cache() / "attention.json"


def recall(asked: str, call: AttentionCall) -> Choice | None:
    """The choice that the file holds for a call on this device with these versions, or None."""
    entry = _entries().get(_key(asked, call))
    try:
        found = cast("dict[str, Any]", entry)
        return Choice(str(found["kernel"]), tuple(map(_trial, found["trials"])), recalled=True)
    except (KeyError, TypeError, ValueError):
        return None


def _trial(read: Mapping[str, Any]) -> Trial:
    time, error, problem = (read.get(name) for name in ("milliseconds", "error", "problem"))
    milliseconds, error = (None if number is None else float(number) for number in (time, error))
    return Trial(str(read["kernel"]), milliseconds, error, None if problem is None else str(problem))


def keep(asked: str, call: AttentionCall, choice: Choice) -> None:
    """Add a choice to the file; where it cannot be written, warn and go on with what is known."""
    trials = [{name: value for name, value in asdict(t).items() if value is not None} for t in choice.trials]
    # Read again right before writing: another process may have added its own.
    entries = {**_entries(), _key(asked, call): {"kernel": choice.kernel, "trials": trials}}
    try:
        atomic_write_text(place(), json_text({"format": _FORMAT, "choices": entries}))
    except HastenError as error:
        warnings.warn(f"The choice of attention kernels cannot be remembered: {error}", stacklevel=2)


def _entries() -> Mapping[str, object]:
    try:
        content = read_json(place()) if place().exists() else {}
        found = cast("dict[str, Any]", content)
        return dict(found["choices"]) if found.get("format") == _FORMAT else {}
    except (HastenError, AttributeError, KeyError, TypeError, ValueError) as error:
        warnings.warn(f"{place()} is not read, and will be written anew: {error}", stacklevel=2)
        return {}


def _key(asked: str, call: AttentionCall) -> str:
    return f"{asked}; {device_name(call.device)}; {_versions()}; {call.shapes}"


@functools.cache
def device_name(device: torch.device) -> str:
    """The card's name; processors are all called `cpu` with their number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.get_num_threads()} threads"


@functools.cache
def _versions() -> str:
    packages = dict.fromkeys(entry.package.distribution for entry in KERNELS.values() if entry.package)
    found = [f"{name} {version}" for name in packages if (version := installed(name))]
    return ", ".join([f"torch {torch.__version__}", *found])
