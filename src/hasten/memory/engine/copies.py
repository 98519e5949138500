"""Copies to the device of execution: begun early, waited for when needed.

On a GPU they run on a stream of their own beside the computation. Memory is allocated on the stream that computes:
the allocator may hand it out again as soon as it is let go, and each copy first waits for what was queued before it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch


class Arrival:
    """Data on their way; `wait` returns them once the computation queued from then on may use them."""

    def __init__(self, data: list[torch.Tensor], ready: Callable[[], None]) -> None:
        self._data, self._ready = data, ready

    def wait(self) -> list[torch.Tensor]:
        """Make what is queued next wait for the copy, not the host where that can be avoided."""
        self._ready()
        return self._data


class Copies(Protocol):
    """Where weights are copied to, and how."""

    device: torch.device

    def begin(self, sources: Sequence[torch.Tensor]) -> Arrival:
        """Start copying."""
        ...


class PlainCopies:
    """Copies at once: on the CPU, where it rehearses what happens with a GPU, and on devices without streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def begin(self, sources: Sequence[torch.Tensor]) -> Arrival:
        """Copy into new memory, also where source and device are the same."""
        return Arrival([self.copy(source) for source in sources], lambda: None)

    def copy(self, source: torch.Tensor) -> torch.Tensor:
        """One copy; strides are kept."""
        return torch.empty_like(source, device=self.device).copy_(source)


class StreamCopies:
    """Copies to a GPU on a stream of their own.

    From page-locked memory a copy is only queued; from other memory the driver keeps the host busy, so a thread does
    it while the main one goes on launching kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="hasten-copies")

    def begin(self, sources: Sequence[torch.Tensor]) -> Arrival:
        """Start copying; returns at once."""
        targets = [torch.empty_like(source, device=self.device) for source in sources]
        before = torch.cuda.Event()
        before.record(torch.cuda.current_stream(self.device))
        run = _copying(self._stream, before, list(sources), targets)
        if all(source.is_pinned() for source in sources):
            done = run()
            return Arrival(targets, lambda: torch.cuda.current_stream(self.device).wait_event(done))
        coming: Future[torch.cuda.Event] = self._worker.submit(run)
        return Arrival(targets, lambda: torch.cuda.current_stream(self.device).wait_event(coming.result()))


def _copying(
    stream: torch.cuda.Stream, before: torch.cuda.Event, sources: list[torch.Tensor], targets: list[torch.Tensor]
) -> Callable[[], torch.cuda.Event]:
    def run() -> torch.cuda.Event:
        stream.wait_event(before)
        with torch.cuda.stream(stream), torch.no_grad():
            for target, source in zip(targets, sources, strict=True):
                target.copy_(source, non_blocking=True)
            done = torch.cuda.Event()
            done.record(stream)
        return done

    return run


def copies_to(device: torch.device) -> Copies:
    """The kind of copies that suits a device."""
    return StreamCopies(device) if device.type == "cuda" else PlainCopies(device)
