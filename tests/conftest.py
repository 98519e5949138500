"""One thread a process: test processes run side by side, and threads that wait for a core cost far more."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HASTEN_CACHE_DIR"] = tempfile.mkdtemp(prefix="hasten-tests-")  # nothing is left in the user's own

import pytest
import torch

torch.set_num_threads(1)

# What tests keep for a next process must not reach the user's cache folder, nor come from it.
_CACHE = tempfile.TemporaryDirectory(prefix="hasten-tests-")
os.environ["HASTEN_CACHE_DIR"] = _CACHE.name


gc.set_threshold(10_000, 10, 10)
_STILL = {1, 4, 16, 64, 256}
_done: list[str] = []


def pytest_runtest_logfinish(nodeid: str) -> None:
    """What libraries have made by then stays; looking through it for garbage took a fifth of the time of the tests."""
    _done.append(nodeid)
    if len(_done) in _STILL:
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def _numbers_are_drawn_alike() -> None:  # pyright: ignore[reportUnusedFunction]
    """A test that draws random numbers without a seed of its own meets the same ones each time."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _diffusers_attention_stays_as_it_was() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """Diffusers' `reset_attention_backend` leaves the last choice active for the whole process."""
    name = "diffusers.models.attention_dispatch"
    before = sys.modules[name]._AttentionBackendRegistry._active_backend if name in sys.modules else None
    yield
    if dispatch := sys.modules.get(name):
        dispatch._AttentionBackendRegistry._active_backend = before or dispatch.AttentionBackendName.NATIVE
