"""Comparisons and durations on the GPU that are read when they have arrived, so that no step waits for them."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class _Pending:
    different: torch.Tensor
    arrived: torch.cuda.Event
    failed: Callable[[], None]


class LateChecks:
    """Checks that tensors are equal, one to a few steps later."""

    def __init__(self) -> None:
        self._pending: list[_Pending] = []

    def expect_equal(
        self, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], failed: Callable[[], None], *, loose: bool = False
    ) -> None:
        """Begin to compare; `failed` is called by a later `look` when any pair differs."""
        found = torch.stack([differs(one, other, loose=loose) for one, other in pairs]).any()
        different = torch.empty((), dtype=torch.bool, pin_memory=True)
        different.copy_(found, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(found.device))
        self._pending.append(_Pending(different, arrived, failed))

    def look(self, *, wait: bool = False) -> None:
        """Read what has arrived, or everything."""
        while self._pending and (wait or self._pending[0].arrived.query()):
            check = self._pending.pop(0)
            check.arrived.synchronize()
            if bool(check.different):
                check.failed()


def differs(one: torch.Tensor, other: torch.Tensor, *, loose: bool) -> torch.Tensor:
    """Are two tensors different, if `loose` by more than rounding? One truth value, on their device."""
    if not loose:
        return (one != other).any()
    rounding = 4 * torch.finfo(other.dtype).eps
    return (one.float() - other.float()).norm() > rounding * other.float().norm()


class Stopwatch:
    """Adds up how long something takes, on a GPU the time that it spends on it."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def measuring(self, device: torch.device) -> Generator[None]:
        """Measure what is inside the block."""
        if device.type != "cuda":
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began
            return
        stream, span = torch.cuda.current_stream(device), (_timed(), _timed())
        span[0].record(stream)
        yield
        span[1].record(stream)
        self._spans.append(span)

    def seconds(self) -> float:
        """The sum so far; waits for the GPU."""
        for began, ended in self._spans:
            ended.synchronize()
            self._seconds += began.elapsed_time(ended) / 1000
        self._spans.clear()
        return self._seconds


def _timed() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
