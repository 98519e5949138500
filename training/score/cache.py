"""Remembers tensors that take long to compute, under a hash of what they were computed from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor


def digest(*parts: Tensor | str) -> str:
    """A short hash of tensors and words."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part.contiguous().numpy().tobytes())
    return total.hexdigest()[:16]


def remember(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `path`, computed and written first if they are not there."""
    if path.exists():
        return load_file(path)
    tensors = {name: tensor.contiguous() for name, tensor in compute().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary)
    temporary.replace(path)
    return tensors
