"""Time of a traced call on a device: each kernel bound by arithmetic or by memory, beside what the host needs.

Roofline model of Williams, Waterman and Patterson (Communications of the ACM 52(4), 2009), with the tiles of matrix
products shared out over the processors, and fusion of the passes between products where a compiler runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from hasten.search.prediction.devices import Device
from hasten.search.prediction.trace import Operation, Trace

TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.75), (64, 64, 0.55))
"""Tiles of a matrix product: rows, columns, and what one processor reaches with them of its best rate."""
SPLITS = (1, 2, 4, 8)
"""Into how many parts the inner dimension may be cut, to give every processor something to do."""
_KEYS = 128
"""Keys that an attention kernel takes at a time; fewer cost as much."""


@dataclass(frozen=True)
class Duration:
    """Seconds of one call: of the device and of the host, which runs ahead of it."""

    device: float
    host: float
    overlap: bool = True

    @property
    def seconds(self) -> float:
        """What passes on the clock."""
        return max(self.device, self.host) if self.overlap else self.device + self.host


def duration(found: Trace, device: Device, compiled: str = "", *, replayed: bool = False) -> Duration:
    """Predict one call. `compiled` is "", "blocks" (the repeated ones) or "whole"; `replayed` as a CUDA graph."""
    inside = _inside(compiled)
    apart = [item for item in found.operations if not inside(item)]
    fused = [item for item in found.operations if inside(item)]
    kernels = sum(item.kind != "view" for item in apart)
    busy = sum(_alone(item, device) for item in apart) + _together(fused, device)
    waiting = kernels * device.launch_seconds + (len(apart) - kernels) * device.view_seconds
    graphs = _runs(found.operations, inside)
    share = len(apart) / max(len(found.operations), 1)
    waiting += graphs * device.graph_seconds + found.modules * share * device.module_seconds
    waiting += _kernels(fused) * device.launch_seconds / 4  # compiled code starts kernels without PyTorch's dispatcher
    return Duration(busy, 0.0 if replayed else waiting, device.overlaps)


def _inside(compiled: str) -> Callable[[Operation], bool]:
    return {"": lambda _: False, "blocks": lambda item: item.inside, "whole": lambda _: True}[compiled]


def _runs(operations: Iterable[Operation], inside: Callable[[Operation], bool]) -> int:
    """How many times compiled code is entered, as far as the order of operations tells."""
    count, before = 0, False
    for item in operations:
        count += inside(item) and not before
        before = inside(item)
    return count


def _alone(item: Operation, device: Device) -> float:
    """Seconds of one kernel that shares nothing with its neighbours."""
    if item.kind == "view":
        return 0.0
    if item.kind == "pass":
        return device.kernel_seconds + item.bytes / (device.bandwidth * device.pass_share)
    work = _attention(item, device) if item.kind == "attention" else _product(item, device)
    return device.kernel_seconds + max(work, item.bytes / device.bandwidth)


def _product(item: Operation, device: Device) -> float:
    rates = device.convolution if item.name.endswith("convolution") else device.product
    rate = device.rate(rates, item.dtype)
    if device.processors <= 1 or not item.flops:
        return item.flops / rate
    return item.flops / (rate * _occupied(item.shape, device.processors))


def _occupied(shape: tuple[int, int, int, int], processors: int) -> float:
    """The share of all processors that the best choice of tiles keeps busy, between 0 and 1."""
    batch, rows, columns, _ = shape
    return max(_share(batch, rows, columns, tile, split, processors) for tile in TILES for split in SPLITS)


def _share(batch: int, rows: int, columns: int, tile: tuple[int, int, float], split: int, processors: int) -> float:
    height, width, quality = tile
    tiles = batch * math.ceil(rows / height) * math.ceil(columns / width)
    useful = batch * rows * columns / (tiles * height * width)
    waves = tiles * split / processors
    return quality * useful * waves / math.ceil(waves) * (1.0 if split == 1 else 0.9)


def _attention(item: Operation, device: Device) -> float:
    _, _, keys, width = item.shape
    padded = math.ceil(keys / _KEYS) * _KEYS / keys
    narrow = min(1.0, 0.6 + 0.4 * width / 128) if width <= 256 else 0.25  # no flash kernel takes wider heads
    return item.flops * padded / (device.rate(device.attention, item.dtype) * narrow)


def _together(items: Sequence[Operation], device: Device) -> float:
    """Seconds of compiled operations: products as before; of the passes only what crosses their borders moves."""
    kernels = [item for item in items if item.kind in ("product", "attention")]
    alone = sum(_alone(item, device) for item in kernels)
    moved, count = _crossing(items)
    return alone + count * device.kernel_seconds + moved / (device.bandwidth * device.fused_share)


def _kernels(items: Sequence[Operation]) -> int:
    products = sum(item.kind in ("product", "attention") for item in items)
    return products + _crossing(items)[1] if items else 0


def _crossing(items: Sequence[Operation]) -> tuple[int, int]:
    """Bytes that fused passes read and write, and their number of kernels.

    Between two products all passes at the same depth become one kernel: what one of them hands to another stays in
    registers. A value moves when a product makes or takes it, or a pass of another depth.
    """
    depth: dict[int, int] = {}
    made: dict[int, tuple[int, int]] = {}
    read: dict[tuple[int, int], int] = {}
    written: dict[tuple[int, int], int] = {}
    for item in items:
        level = max((depth.get(number, 0) for number, _ in item.reads), default=0)
        for number, size in item.reads if item.kind != "view" else ():
            if number in made and (item.kind != "pass" or made[number][0] != level):
                written[number, made[number][0]] = made[number][1]
            if item.kind == "pass" and made.get(number, (-1, 0))[0] != level:
                read[number, level] = max(size, read.get((number, level), 0))
        for number, size in item.writes if item.kind != "view" else ():
            depth[number] = level + (item.kind != "pass")
            made.pop(number, None)
            if item.kind == "pass":
                made[number] = (level, size)
    return sum(read.values()) + sum(written.values()), len(written)
