"""Writes adapters as diffusers and PEFT read them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from hasten.core.files import atomic_write_bytes

PREFIXES = {"denoiser": "transformer"}
"""What stands in front of the layers of a component, where it is not the component's own name."""


def save_adapter(
    path: str | Path,
    layers: Mapping[tuple[str, str], tuple[torch.Tensor, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write down, [rank, inputs], and up, [outputs, rank], of layers (component, path); the whole file or nothing.

    Matrices of convolutions have four dimensions. No alpha is written, which readers take for alpha = rank: the
    product of the matrices is what is added to the weight.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}
    for (component, name), (down, up) in layers.items():
        key = f"{PREFIXES.get(component, component)}.{name}"
        tensors[f"{key}.lora_A.weight"] = down.detach().cpu().contiguous()
        tensors[f"{key}.lora_B.weight"] = up.detach().cpu().contiguous()
    return atomic_write_bytes(path, save(tensors, {"format": "pt", **(metadata or {})}))
