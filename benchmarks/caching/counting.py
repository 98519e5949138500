"""Counts what a denoiser really computed, the same way for everybody: multiplications in its linear layers.

Whoever skips blocks, attention or the whole network leaves fewer of them; no peer's own statistics are believed.
Attention products and norms are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

FULL = 0.995
"""A call with at least this share of a complete call's work is a full step."""


class Work:
    """Work of each denoiser call since the last `take`."""

    def __init__(self) -> None:
        self._calls: list[int] = []

    @contextmanager
    def watching(self, denoiser: nn.Module) -> Iterator[None]:
        """Count while inside. Entered before a peer patches the denoiser, and left after it."""
        handles: list[Any] = [denoiser.register_forward_pre_hook(self._begin)]
        leaves = [module for module in denoiser.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        handles += [leaf.register_forward_hook(self._add) for leaf in leaves]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def take(self) -> list[int]:
        """The counts of the calls so far, and begin anew."""
        calls, self._calls = self._calls, []
        return calls

    def _begin(self, _module: nn.Module, _args: Any) -> None:
        self._calls.append(0)

    def _add(self, module: nn.Module, _args: Any, output: Any) -> None:
        if self._calls and isinstance(output, torch.Tensor):
            self._calls[-1] += output.numel() * products(module)


def products(module: nn.Module) -> int:
    """Multiplications for one output value."""
    if isinstance(module, nn.Conv2d):
        return module.in_channels // module.groups * module.kernel_size[0] * module.kernel_size[1]
    return int(module.in_features) if isinstance(module, nn.Linear) else 0


def summary(images: list[list[int]], complete: int, steps: int) -> dict[str, float]:
    """Means over images: full, partly computed and left-out steps, and the share of `steps` complete calls.

    `complete` is the work of one complete call; a model calls its denoiser once a step.
    """
    full = [sum(work >= FULL * complete for work in calls) for calls in images]
    partial = [len(calls) - count for calls, count in zip(images, full, strict=True)]
    work = [sum(calls) / (complete * steps) for calls in images]
    left_out = [max(steps - len(calls), 0) for calls in images]
    named = {"full_steps": full, "partial_steps": partial, "left_out_steps": left_out, "work": work}
    return {name: sum(values) / len(values) for name, values in named.items()}
