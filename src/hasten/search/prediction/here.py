"""Measures this machine's device in about 20 seconds: what a roofline needs to know, nothing about any model."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from torch import nn
from torch.utils._pytree import tree_map

from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.registry import specs
from hasten.core.user_cache import user_cache
from hasten.measure.environment import environment
from hasten.measure.instruments import synchronize
from hasten.search.prediction.devices import Device, device_titled
from hasten.search.prediction.networks import meta_copy
from hasten.search.prediction.roofline import duration
from hasten.search.prediction.trace import trace

BUDGET = 1.3
"""Seconds for each of about fifteen measurements."""


def measure_device(device: torch.device, budget: float = BUDGET) -> Device:
    """Measure products, attention, convolutions, copies and the host's overheads on a device, and keep the result."""
    bench = _Bench(device, budget)
    half, gpu = (torch.bfloat16 if device.type == "cuda" else torch.float32), device.type == "cuda"
    copied = bench.copied()
    found = Device(
        name="here",
        title=_title(device),
        memory=_memory(device),
        product=_both(bench.product, half),
        attention=_both(bench.attention, half),
        convolution=_both(bench.convolution, half),
        bandwidth=copied,
        pass_share=min(1.0, bench.passed() / copied),
        host_link=bench.link() if gpu else copied,
        processors=torch.cuda.get_device_properties(device).multi_processor_count if gpu else 1,
        kernel_seconds=2e-6 if gpu else 0.0,
        reserve=600 * 2**20 if gpu else 0,
        workspace=32 * 2**20 if gpu else 0,
        overlaps=gpu,
        float8=gpu and torch.cuda.get_device_capability(device) >= (8, 9),
        basis="measured here",
    )
    found = _with_host(found, bench)
    atomic_write_text(_file(device), json_text(dataclasses.asdict(found)))
    return found


def device_here(device: torch.device) -> Device | None:
    """What is known of this machine's device: measured earlier, else from the table; None where neither is."""
    file = _file(device)
    if file.is_file():
        try:
            return Device(**cast("dict[str, Any]", read_json(file)))
        except (HastenError, TypeError):  # damaged, or written by another version
            return device_titled(_title(device))
    return device_titled(_title(device))


def _with_host(found: Device, bench: _Bench) -> Device:
    """Scale the host's overheads so that they explain the time of a small U-Net, whose arithmetic takes none."""
    spec = specs()["sdxl"]
    model = spec.build_tiny().to(bench.device)
    given: dict[str, Any] = tree_map(lambda value: value.to(bench.device), spec.example(spec.tiny))
    with torch.no_grad():
        took = bench.seconds(lambda: model(**given))
    small = meta_copy(model)
    meta: dict[str, Any] = tree_map(lambda value: value.to("meta"), given)
    predicted = duration(trace(lambda: small(**meta), small), found)
    host = took if found.overlaps else max(took - predicted.device, 0.1 * took)
    names = ("launch_seconds", "view_seconds", "module_seconds")
    return dataclasses.replace(found, **{name: getattr(found, name) * host / predicted.host for name in names})


def _file(device: torch.device) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in _title(device).lower())
    return user_cache() / "devices" / f"{name}.json"


def _title(device: torch.device) -> str:
    return str(environment(device)["device"])


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def _both(measured: Callable[[torch.dtype], float], half: torch.dtype) -> dict[str, float]:
    single = measured(torch.float32)
    return {"float32": single, "half": single if half == torch.float32 else measured(half)}


class _Bench:
    """Small workloads, sized for the kind of device."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget
        self._large = device.type == "cuda"

    def seconds(self, work: Callable[[], object]) -> float:
        """Median seconds of `work` within the budget, after one call that does not count."""
        work()
        synchronize(self.device)
        found: list[float] = []
        until = time.perf_counter() + self.budget
        while not found or time.perf_counter() < until:
            began = time.perf_counter()
            work()
            synchronize(self.device)
            found.append(time.perf_counter() - began)
        return statistics.median(found)

    def product(self, dtype: torch.dtype) -> float:
        """Operations a second of a large matrix product."""
        side = 8192 if self._large else 1024
        left = torch.randn(side, side, device=self.device, dtype=dtype)
        return 2 * side**3 / self.seconds(lambda: left @ left)

    def attention(self, dtype: torch.dtype) -> float:
        """Operations a second of fused attention with heads of 128."""
        heads, tokens = (24, 4608) if self._large else (2, 512)
        query = torch.randn(1, heads, tokens, 128, device=self.device, dtype=dtype)
        work = self.seconds(lambda: nn.functional.scaled_dot_product_attention(query, query, query))
        return 4 * heads * tokens**2 * 128 / work

    def convolution(self, dtype: torch.dtype) -> float:
        """Operations a second of 3 x 3 convolutions."""
        channels, side = (512, 128) if self._large else (64, 64)
        layer = nn.Conv2d(channels, channels, 3, padding=1, device=self.device, dtype=dtype)
        picture = torch.randn(1, channels, side, side, device=self.device, dtype=dtype)
        with torch.no_grad():
            return 2 * 9 * channels**2 * side**2 / self.seconds(lambda: layer(picture))

    def copied(self) -> float:
        """Bytes a second that a copy reads and writes."""
        source = torch.ones(2**28 if self._large else 2**24, device=self.device)
        target = torch.ones_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def passed(self) -> float:
        """Bytes a second that an elementwise product reads and writes, into memory that it asks for."""
        source = torch.ones(2**27 if self._large else 2**20, device=self.device)
        return 3 * source.nbytes / self.seconds(lambda: torch.mul(source, source))

    def link(self) -> float:
        """Bytes a second from page-locked host memory."""
        source = torch.zeros(2**26, pin_memory=True)
        target = torch.empty_like(source, device=self.device)
        return 2**28 / self.seconds(lambda: target.copy_(source, non_blocking=True))
