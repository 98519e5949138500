"""Devices by name, and maps of names to devices as text: `transformer.blocks.0-9=cuda:0; vae=cpu`.

`cpu:1`, `cpu:2` and so on stand for further devices in host memory: weights and tensors are really copied, so that a
map can be rehearsed on any machine.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from hasten.core.errors import InvalidSetting, nearest
from hasten.memory.engine.sizes import parse_bytes

_DEVICE = re.compile(r"[a-z]+(:\d+)?")
USABLE = 0.8
"""Share of the free memory that weights may take; the rest is left to activations."""


def read_pairs(text: str, what: str) -> list[tuple[str, str]]:
    """Read `name=value; name=value`; `what` says in errors what is read."""
    pairs: list[tuple[str, str]] = []
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not (sign and name and value):
            raise InvalidSetting(f"{part!r} in {what} is not of the form name=value, such as vae=cpu.")
        pairs.append((name, value))
    if not pairs:
        raise InvalidSetting(f"{what} is empty; write it like 'transformer=cuda:0; vae=cpu'.")
    return pairs


def as_text(mapping: Mapping[str, str | int]) -> str:
    """A dictionary, as accelerate writes it (a number is a GPU, an empty name is everything), as text."""
    places = {name: f"cuda:{place}" if type(place) is int else place for name, place in mapping.items()}
    if wrong := [name for name, place in places.items() if not isinstance(place, str)]:
        raise InvalidSetting(f"the device of {wrong[0]!r} must be a text or the number of a GPU.")
    return "; ".join(f"{name or '*'}={place}" for name, place in places.items())


def canonical(place: str) -> str:
    """The one way to write a device: `cuda:0` for `cuda`, `cpu` for `cpu:0`."""
    if not _DEVICE.fullmatch(place):
        raise InvalidSetting(f"{place!r} is no device; write it like cuda:0 or cpu.")
    if place == "cpu:0":
        return "cpu"
    return f"{place}:0" if ":" not in place and place != "cpu" else place


def device_of(place: str) -> torch.device:
    """Where tensors of a place are."""
    return torch.device("cpu" if place.startswith("cpu") else place)


def gpus() -> list[str]:
    """The GPUs of this machine."""
    return [f"cuda:{index}" for index in range(torch.cuda.device_count())]


def unknown_place(place: str) -> str | None:
    """Say why a device cannot be used on this machine."""
    known = [*gpus(), "cpu"]
    if place in known or place.startswith("cpu:") or (place == "mps:0" and torch.backends.mps.is_available()):
        return None
    return f"there is no device {place} on this machine. {nearest(place, known)}"


def usable_memory(present: Mapping[str, int]) -> dict[str, int]:
    """For each GPU the bytes that weights may take; `present` are bytes of weights there that will be placed anew."""
    found: dict[str, int] = {}
    for place in gpus():
        device = torch.device(place)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + cached + present.get(place, 0)
        found[place] = int(free * USABLE)
    return found


def read_memory(text: str) -> dict[str, int]:
    """Read `cuda:0=20GB; cpu=60GB`."""
    return {canonical(place): parse_bytes(size) for place, size in read_pairs(text, "the memory of devices")}
