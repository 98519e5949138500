"""Timestep arguments: where they stand in a denoiser's call, and what can be told from their values alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from hasten.core.target import Denoiser


class TimestepReader:
    """Infers requests, steps and branches from timestep values alone.

    Limit: two successive requests of a single step with equal timesteps look like two branches of one step, up to
    `MOST_BRANCHES` calls; the first value of a request coming back begins a new request.
    """

    MOST_BRANCHES = 4

    def __init__(self) -> None:
        self._values: list[float] = []
        self._ordinals: dict[str, int] = {}

    def read(self, name: str, value: float) -> tuple[bool, int, int]:
        """Return (did a request begin, step, ordinal of the call within its step)."""
        repeated = bool(self._values) and value == self._values[-1]
        began = not self._values or (not repeated and self._turned(value)) or self._crowded(name, repeated)
        if began:
            self._values = [value]
            self._ordinals = {}
        elif not repeated:
            self._values.append(value)
            self._ordinals = {}
        self._ordinals[name] = self._ordinals.get(name, -1) + 1
        return began, len(self._values) - 1, self._ordinals[name]

    def _turned(self, value: float) -> bool:
        if len(self._values) < 2:
            return False
        return (value - self._values[-1]) * (self._values[-1] - self._values[0]) < 0

    def _crowded(self, name: str, repeated: bool) -> bool:
        return repeated and self._ordinals.get(name, -1) + 1 >= self.MOST_BRANCHES


def argument_reader(denoiser: Denoiser) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """Return the function that finds the timestep among a call's arguments."""
    name = denoiser.spec.timestep
    parameters = list(inspect.signature(denoiser.module.forward).parameters)
    position = parameters.index(name) if name in parameters else None

    def read(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs or position is None:
            return kwargs.get(name)
        return args[position] if position < len(args) else None

    return read


def on_gpu(value: Any) -> bool:
    """Would reading this value wait for a device?"""
    return isinstance(value, torch.Tensor) and value.device.type != "cpu"


def on_host(value: Any) -> float:
    """The timestep as a number; of a batch, the first."""
    return float(value.flatten()[0].item()) if isinstance(value, torch.Tensor) else float(value or 0.0)


def position(timesteps: torch.Tensor, first: float, timestep: Any) -> int | None:
    """The place of a timestep among all of a schedule, without waiting for a device; None if it cannot be told.

    A pipeline usually passes an element (a view) of `timesteps`, recognized by its place in memory. Of a copy the value
    would have to be trusted, which may have been rescaled or rounded: it counts only as the very first one.
    """
    if isinstance(timestep, torch.Tensor) and _is_part(timestep, timesteps):
        place = (timestep.storage_offset() - timesteps.storage_offset()) // max(timesteps.stride(0), 1)
        return place if 0 <= place < len(timesteps) else None
    return 0 if not on_gpu(timestep) and on_host(timestep) == first else None


def _is_part(some: torch.Tensor, whole: torch.Tensor) -> bool:
    alike = some.device == whole.device and some.dtype == whole.dtype and some.numel() > 0
    return alike and some.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
