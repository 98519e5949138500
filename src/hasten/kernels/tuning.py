"""Which kernel is fastest for products of one kind and size, measured once on this machine and kept on disk.

Nothing is measured unless `kernels.product.tune` is called: which kernel computes a picture must not depend on chance.
"""

from __future__ import annotations

import functools
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from hasten.core.errors import HastenError
from hasten.core.files import atomic_write_text, json_text, read_json
from hasten.core.packages import installed
from hasten.core.user_cache import user_cache
from hasten.kernels.call import Kernel, Product

_FORMAT = 2
"""Raised when kernels that were measured before are no longer the ones to compare."""
_RUNS, _SECONDS = 20, 0.2
"""A kernel runs up to so often, and no longer than that."""


def place() -> Path:
    """The file: `products.json` in the user's cache folder (see `core.user_cache`)."""
    return user_cache() / "products.json"


def known(product: Product) -> str | None:
    """The kernel that was fastest for such a product, if that was measured on this machine."""
    table = _table()
    return table.get(key(product)) if table else None


def measure(product: Product, kernels: Sequence[Kernel]) -> str | None:
    """Time kernels on a product, keep the name of the fastest and return it; None where none of them runs."""
    times = {kernel.name: found for kernel in kernels if (found := _milliseconds(kernel, product)) is not None}
    if not times:
        return None
    fastest = min(times, key=lambda name: times[name])
    # Read again right before writing: another process may have added its own.
    forget()
    _table()[key(product)] = fastest
    try:
        atomic_write_text(place(), json_text({"format": _FORMAT, "fastest": _table()}))
    except HastenError as error:
        warnings.warn(f"The fastest kernels cannot be remembered: {error}", stacklevel=2)
    return fastest


def forget() -> None:
    """Read the file again at the next question."""
    _table.cache_clear()


def key(product: Product) -> str:
    """What products have in common that one kernel is fastest for; tokens are counted in powers of two."""
    tokens, outputs, inputs = product.sizes
    weight, ranks = product.weight, 0 if product.down is None else product.down.shape[0]
    kind = (
        f"{weight.number.name} of {weight.columns // weight.groups}, {product.activations}, rotation {product.rotation}"
    )
    sizes = f"{1 << (tokens - 1).bit_length()} x {outputs} x {inputs}, ranks {ranks}"
    return f"{_device(product.x.device)}; {kind}; {product.x.dtype}; {sizes}"


@functools.cache
def _table() -> dict[str, str]:
    try:
        content = read_json(place()) if place().exists() else {}
        found = cast("dict[str, Any]", content)
        return {str(key): str(name) for key, name in found["fastest"].items()} if found.get("format") == _FORMAT else {}
    except (HastenError, AttributeError, KeyError, TypeError) as error:
        warnings.warn(f"{place()} is not read, and will be written anew: {error}", stacklevel=2)
        return {}


@functools.cache
def _device(device: torch.device) -> str:
    name = f"cpu {torch.get_num_threads()} threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, triton {installed('triton')}"


def _milliseconds(kernel: Kernel, product: Product) -> float | None:
    """Median time of a run; None for a kernel that fails."""
    run, device = functools.partial(kernel.run, product), product.x.device
    try:
        # The first run compiles, the second warms up.
        first = [_once(run, device) for _ in range(2)][-1]
    except Exception as error:  # noqa: BLE001 - a kernel may fail in any way; the choice goes on without it
        warnings.warn(f"{kernel.name}: {error}", stacklevel=2)
        return None
    count = max(3, min(_RUNS, int(_SECONDS * 1000 / max(first, 1e-3))))
    return statistics.median(_once(run, device) for _ in range(count))


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        run()
        return 1000 * (time.perf_counter() - began)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)
