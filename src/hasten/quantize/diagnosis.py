"""Quantization's share of `hasten doctor`: every kernel of quantized products, tried."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch

from hasten.core.diagnosis import Finding
from hasten.core.trying import in_another_process
from hasten.kernels import gpu
from hasten.kernels.product import kernels
from hasten.kernels.trial import KIND


def diagnose(device: torch.device) -> Iterator[Finding]:
    """Try every kernel on a device in other processes, and say what keeps those for GPUs away."""
    names = [kernel.name for kernel in kernels(device)]
    yield from in_another_process("hasten.kernels.trial", KIND, names, str(device))
    if gpu.usable(device):
        return
    if device.type != "cuda":
        yield Finding(kind=KIND, name="kernels in Triton", status="unfit", detail="made for GPUs of NVIDIA and AMD")
    elif importlib.util.find_spec("triton") is None:
        detail = "products on this GPU are computed by the reference; install it: pip install triton"
        yield Finding(kind=KIND, name="kernels in Triton", status="missing", detail=detail)
    else:
        detail = "need compute capability 8.0 or newer"
        yield Finding(kind=KIND, name="kernels in Triton", status="unfit", detail=detail)
