"""One buffer of host memory for the weights of a unit: one copy moves them all, and it can be page-locked exactly.

PyTorch's own pinned memory is handed out in powers of two, which takes up to twice the host memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from hasten.core.errors import HastenError

ALIGNMENT = 256
"""Bytes; what CUDA's own allocator guarantees."""


def size_in_arena(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of a buffer for these tensors: each begins at a multiple of the alignment."""
    return sum(-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors)


class Arena:
    """The given tensors, copied one after the other into one buffer of host memory; strides are kept."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._forms = [(t.dtype, t.shape, t.stride(), t.numel() * t.element_size()) for t in tensors]
        self._offsets: list[int] = []
        end = 0
        for *_, size in self._forms:
            self._offsets.append(end)
            end += -(-size // ALIGNMENT) * ALIGNMENT
        self.buffer = torch.empty(end, dtype=torch.uint8)
        self._pinned = False
        for view, tensor in zip(self.views(self.buffer), tensors, strict=True):
            view.copy_(tensor)

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The tensors inside a buffer of this form, on any device."""
        return [
            buffer[offset : offset + size].view(dtype).as_strided(shape, strides)
            for (dtype, shape, strides, size), offset in zip(self._forms, self._offsets, strict=True)
        ]

    def pin(self) -> None:
        """Page-lock the buffer, so that copies to a GPU run beside computation."""
        status = int(_runtime().cudaHostRegister(self.buffer.data_ptr(), self.buffer.numel(), 0))
        if status:
            raise HastenError(
                f"The driver did not page-lock {self.buffer.numel()} bytes (CUDA error {status}); "
                "allow less with pinned='4GB', or none with pinned='0'."
            )
        self._pinned = True

    def close(self) -> None:
        """Let the pages go; the buffer itself stays until nothing refers to it."""
        if self._pinned:
            torch.cuda.synchronize()
            _runtime().cudaHostUnregister(self.buffer.data_ptr())
            self._pinned = False


def _runtime() -> Any:
    return torch.cuda.cudart()
