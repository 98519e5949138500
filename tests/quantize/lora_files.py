"""Adapter files for tests, and PEFT as the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hasten.core.target import Target
from hasten.quantize.engine.adapter_layers import adaptable
from hasten.quantize.engine.ranks import sizes
from tests.contract.rigs import Rig

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_in", "conv1")


def matrices(rig: Rig, *, rank: int = 4, seed: int = 0, only: tuple[str, ...] = ATTENTION) -> dict[str, Any]:
    """Random matrices, down and up, by path, for layers of the denoiser whose names end in one of `only`."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[str, Any] = {}
    for (component, path), layer in adaptable(Target.of(rig)).items():
        if component in ("transformer", "unet") and path.endswith(only):
            inputs, outputs = sizes(layer) or (0, 0)
            down, up = torch.randn(rank, inputs, generator=generator), torch.randn(outputs, rank, generator=generator)
            window = (layer.in_channels, *layer.kernel_size) if isinstance(layer, torch.nn.Conv2d) else (inputs,)
            one = (1, 1) if isinstance(layer, torch.nn.Conv2d) else ()
            found[path] = (down.reshape(rank, *window) * 0.1, up.reshape(outputs, rank, *one) * 0.3)
    assert found
    return found


def peft_file(path: Path, pairs: dict[str, Any], *, prefix: str = "transformer.", alpha: float | None = None) -> str:
    """The file as diffusers writes it; alpha goes into the header."""
    tensors = {f"{prefix}{k}.lora_A.weight": down.contiguous() for k, (down, _) in pairs.items()}
    tensors |= {f"{prefix}{k}.lora_B.weight": up.contiguous() for k, (_, up) in pairs.items()}
    text = f'{{"{prefix}lora_alpha": {alpha}, "{prefix}r": 4}}'
    save_file(tensors, path, {} if alpha is None else {"lora_adapter_metadata": text})
    return str(path)


def with_peft(rig: Rig, pairs: dict[str, Any], scale: float = 1.0, name: str = "default") -> Rig:
    """Put the adapter into the denoiser with PEFT."""
    import peft

    rank = next(iter(pairs.values()))[0].shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(pairs), init_lora_weights=False)
    peft.inject_adapter_in_model(config, rig.denoiser, adapter_name=name)
    for path, (down, up) in pairs.items():
        layer: Any = rig.denoiser.get_submodule(path)
        layer.lora_A[name].weight.data.copy_(down)
        layer.lora_B[name].weight.data.copy_(up)
        layer.set_scale(name, scale)
    for module in rig.denoiser.modules():
        if hasattr(module, "lora_A"):
            module.set_adapter(list(module.lora_A))  # pyright: ignore
    return rig
