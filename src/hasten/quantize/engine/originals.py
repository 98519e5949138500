"""Where the original weights are while quantized ones stand in their places."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import nn

from hasten.core.patch import Patch


@dataclass(frozen=True)
class Originals:
    """What becomes of original weights: they stay where they are, wait in host memory, or are dropped."""

    place: Literal["keep", "cpu", "drop"]


def set_aside(layer: nn.Linear | nn.Conv2d, originals: Originals, patch: Patch) -> None:
    """Put the weight of a replaced layer where it waits; a dropped one leaves an empty weight behind."""
    data = layer.weight.data
    if originals.place == "drop":
        layer.weight.data = torch.empty(0, dtype=data.dtype, device=data.device)
    elif originals.place == "cpu" and data.device.type not in ("cpu", "meta"):
        home = data.to("cpu")
        layer.weight.data = home
        patch.undo(layer, "original weight waits in host memory", partial(_bring_back, layer, data.device))


def _bring_back(layer: nn.Linear | nn.Conv2d, device: torch.device) -> None:
    layer.weight.data = layer.weight.data.to(device)
