"""Statistics from random inputs, for tests and trial runs: no picture is made, and no number is worth keeping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from hasten.core.intercept import base_class
from hasten.core.target import Denoiser, Target
from hasten.quantize.engine.sites import Site
from hasten.quantize.engine.watching import Statistics, Watcher

CALLS = 2


@torch.no_grad()
def synthetic_statistics(target: Target, watched: Iterable[Site]) -> Statistics:
    """Watch the layers while each denoiser is called with the example inputs of its specification."""
    watcher = Watcher(watched)
    try:
        for denoiser in target.denoisers:
            # All in one half: comparing two would take longer than the rest, for numbers that mean nothing.
            for seed in range(CALLS):
                _call(denoiser, seed)
    finally:
        watcher.stop()
    return watcher.statistics()


def _call(denoiser: Denoiser, seed: int) -> None:
    module = denoiser.module
    weight = next(module.parameters())
    given = _moved(denoiser.spec.example(module.config, seed=seed), weight)  # pyright: ignore[reportArgumentType]
    # Not the instance's own call: what counts its calls (a session's clock) is not to see these.
    base_class(module).forward(module, **given, return_dict=False)


def _moved(value: Any, like: torch.Tensor) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(like.device, like.dtype if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {key: _moved(item, like) for key, item in value.items()}  # pyright: ignore
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, like) for item in value)  # pyright: ignore
    return value
