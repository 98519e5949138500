"""Attention's share of `hasten doctor`: every kernel, tried."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from hasten.attention.kernels import KERNELS
from hasten.attention.trial import KIND
from hasten.core.diagnosis import Finding
from hasten.core.trying import in_another_process


def diagnose(device: torch.device) -> Iterator[Finding]:
    """Try every attention kernel on a device, in other processes."""
    yield from in_another_process("hasten.attention.trial", KIND, KERNELS, str(device))
