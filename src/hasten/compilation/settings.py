"""What a recording depends on beside its inputs: which weights lie where, and settings that the call reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

_PLAIN = (bool, int, float, str, type(None))


def settings_of(module: nn.Module) -> tuple[object, ...]:
    """Modules, places of weights, plain attributes of everything that is composed, and adapters with their scales.

    Weights that are changed in place keep their place: a replay reads the new values, and nothing changes here.
    """
    return tuple(item for part in module.modules() for item in _of_part(part))


def _of_part(part: nn.Module) -> Iterator[object]:
    yield id(part)
    for tensor in (*part._parameters.values(), *part._buffers.values()):
        if tensor is not None:
            yield _place(tensor)
    if part._modules:
        yield from (value for value in part.__dict__.values() if type(value) in _PLAIN)
    if "scaling" in part.__dict__:
        yield from _of_adapters(part)


def _of_adapters(part: Any) -> Iterator[object]:
    """PEFT's layers compute with Python numbers and lists of names."""
    for name, scale in cast("dict[str, object]", part.scaling).items():
        yield (name, _place(scale) if isinstance(scale, torch.Tensor) else scale)
    yield tuple(getattr(part, "active_adapters", ()))
    yield tuple(getattr(part, "merged_adapters", ()))


def _place(tensor: torch.Tensor) -> object:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # wrappers of quantized data have no place of their own
        return id(tensor)
