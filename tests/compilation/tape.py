"""A stand-in for CUDA graphs on the CPU: operations are taped, and a replay repeats them at the same addresses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tape(TorchDispatchMode):
    """Notes every operation; Python's part of a function is not in it, just as with a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, Any, Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        output = func(*args, **(kwargs or {}))
        self.steps.append((func, args, kwargs or {}, tree_leaves(output)))
        return output

    def replay(self) -> None:
        for func, args, kwargs, places in self.steps:
            for place, value in zip(places, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(place, torch.Tensor) and place is not value and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class TapeRecorder:
    """Records with tapes; counts what it was asked to do."""

    def __init__(self) -> None:
        self.warmed = self.recorded = 0

    def warm(self, run: Callable[[], object]) -> None:
        self.warmed += 1
        run()

    def record(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.recorded += 1
        # Compiled code does not run under a dispatch mode; what it was compiled from is taped.
        with torch.compiler.set_stance("force_eager"), Tape() as tape:
            output = run()
        return tape.replay, output
