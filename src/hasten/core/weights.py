"""Which weights a network has: a hash that does not depend on where they are or how precisely they are kept."""

from __future__ import annotations

import hashlib
from weakref import WeakKeyDictionary

import torch
from torch import nn

SAMPLES = 16
"""Elements of each weight that are looked at."""

_SEEN: WeakKeyDictionary[nn.Module, tuple[int, str]] = WeakKeyDictionary()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 of the names and shapes of all parameters and of samples of their values, as bfloat16.

    The same for a model in float32 on the CPU and in bfloat16 on a GPU, different after training, fusing or merging.
    Adapters that PEFT has put in are left out, as they can be switched. Remembered until a weight is changed.
    """
    weights = [(name, weight) for name, weight in module.named_parameters() if "lora_" not in name]
    state = sum(weight._version + 1 for _, weight in weights)
    seen = _SEEN.get(module)
    if seen is None or seen[0] != state:
        _SEEN[module] = seen = (state, _hash(weights))
    return seen[1]


def known_hash(module: nn.Module) -> str | None:
    """The hash as it was last asked for: before other techniques replaced the weights; None when it never was."""
    seen = _SEEN.get(module)
    return None if seen is None else seen[1]


def _hash(weights: list[tuple[str, nn.Parameter]]) -> str:
    digest = hashlib.sha256()
    places: dict[torch.device, list[torch.Tensor]] = {}
    for name, weight in sorted(weights, key=lambda pair: pair[0]):
        plain = name.replace(".base_layer.", ".").replace("_orig_mod.", "")
        digest.update(f"{plain} {tuple(weight.shape)};".encode())
        if weight.device.type != "meta":
            places.setdefault(weight.device, []).append(_sample(weight.detach()))
    for samples in places.values():
        digest.update(torch.cat(samples).cpu().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def _sample(weight: torch.Tensor) -> torch.Tensor:
    flat = weight.reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].to(torch.bfloat16)
