"""What a measurement ran on: versions, device, threads, memory meaning."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from hasten.core.target import Target
from hasten.formats.saving import is_quantized

Fact = str | bool | int | float | None


def environment(device: torch.device) -> dict[str, Fact]:
    """Describe this machine for a report; `peak_memory` says what the memory column means."""
    facts: dict[str, Fact] = {name: installed(name) for name in ("hasten", "torch", "diffusers", "transformers")}
    facts |= {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    if device.type == "cuda":
        facts |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
        facts["peak_memory"] = "peak GPU memory allocated by PyTorch"
    else:
        facts |= {"device": _processor(), "threads": torch.get_num_threads(), "cores": os.cpu_count()}
        facts["peak_memory"] = "peak resident memory of the process"
    return facts


def precision(target: Target) -> str:
    """The type that a model computes in, and whether its weights are quantized as it stands."""
    dtype = str(target.dtype).removeprefix("torch.")
    quantized = any(is_quantized(denoiser.module) for denoiser in target.denoisers)
    return f"{dtype} with quantized weights" if quantized else dtype


def installed(package: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor() or "CPU"
    except OSError:
        return platform.processor() or "CPU"
