"""Where the kernels written in Triton can serve; everywhere else the eager references compute."""

from __future__ import annotations

import importlib.util
from collections import Counter

import torch

HAVE_TRITON = importlib.util.find_spec("triton") is not None
LARGEST_ROW = 16384
"""Channels of a row that one program holds in registers at most."""
launches: Counter[str] = Counter()
"""Passes that kernels have made in this process, by operator; readers compare two points in time."""
_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def served(*tensors: torch.Tensor | None) -> bool:
    """Can the kernels take these tensors, whose last dimension holds the channels? They compute no gradients."""
    given = [tensor for tensor in tensors if tensor is not None]
    return HAVE_TRITON and not torch.is_grad_enabled() and all(_fits(tensor) for tensor in given)


def obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot serve on a device, or None."""
    if device.type != "cuda":
        return f"the model is on the {device.type}"
    return None if HAVE_TRITON else "Triton is not installed"


def _fits(tensor: torch.Tensor) -> bool:
    known = tensor.is_cuda and tensor.dtype in _TYPES
    return known and 0 < tensor.shape[-1] <= LARGEST_ROW and tensor.numel() > 0


def codes_float8(device: torch.device) -> bool:
    """Does the card convert to 8-bit floats?"""
    return torch.cuda.get_device_capability(device) >= (8, 9)
