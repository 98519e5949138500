"""Measures a run without disturbing it: time per phase and peak memory, on a CPU or a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch

from hasten.core.intercept import intercept
from hasten.core.target import Target

PHASES: tuple[str, ...] = ("text_encoder", "denoise", "vae")


class Stopwatch:
    """Seconds spent in text encoders, denoisers and VAE; GPU times come from events, read after the run."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._spans: list[tuple[str, Any, Any]] = []
        self._gpu = target.device.type == "cuda"

    @contextmanager
    def running(self) -> Generator[None]:
        """Time the phases of everything that runs inside."""
        removers = [intercept(obj, method, self._timing(phase)) for phase, obj, method in _phases(self._target)]
        try:
            yield
        finally:
            for remove in reversed(removers):
                remove()

    def seconds(self) -> dict[str, float]:
        """Total seconds per phase so far."""
        if self._gpu:
            torch.cuda.synchronize()
        totals = dict.fromkeys(PHASES, 0.0)
        for phase, began, ended in self._spans:
            totals[phase] += began.elapsed_time(ended) / 1000 if self._gpu else ended - began
        return totals

    def _timing(self, phase: str) -> Callable[..., Any]:
        def timed(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            began = self._mark()
            result = call(*args, **kwargs)
            self._spans.append((phase, began, self._mark()))
            return result

        return timed

    def _mark(self) -> Any:
        if not self._gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _phases(target: Target) -> Iterator[tuple[str, object, str]]:
    for denoiser in target.denoisers:
        yield "denoise", denoiser.module, "__call__"
    for name, module in target.modules.items():
        if name.startswith("text_encoder"):
            yield "text_encoder", module, "__call__"
    if target.vae is not None and hasattr(target.vae, "decode"):
        yield "vae", target.vae, "decode"


class PeakMemory:
    """Peak memory while a block runs: allocated GPU memory, or on a CPU the resident memory of the process."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0

    @contextmanager
    def watching(self) -> Generator[None]:
        """Record the peak of everything that runs inside, in `bytes`."""
        watch = self._watch_gpu() if self._device.type == "cuda" else self._watch_process()
        with watch:
            yield

    @contextmanager
    def _watch_gpu(self) -> Generator[None]:
        torch.cuda.reset_peak_memory_stats(self._device)
        try:
            yield
        finally:
            self.bytes = max(self.bytes, torch.cuda.max_memory_allocated(self._device))

    @contextmanager
    def _watch_process(self) -> Generator[None]:
        process, done = psutil.Process(), threading.Event()

        def sample() -> None:
            while not done.is_set():
                self.bytes = max(self.bytes, process.memory_info().rss)
                done.wait(0.01)

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished; on a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
