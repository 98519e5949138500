"""The optimisers of fine-tuning: AdamW, and AdamW with its state in 8 bits."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch

from hasten.core.errors import HastenError

OPTIMIZERS = ("auto", "adamw", "adamw8bit")


def optimizer(
    name: str, parameters: list[torch.Tensor], device: torch.device, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    """AdamW over the parameters; `adamw8bit` keeps its state in 8 bits (https://arxiv.org/abs/2110.02861).

    "auto" takes 8 bits on a GPU where bitsandbytes is installed. Raises HastenError where it is missing.
    """
    there = importlib.util.find_spec("bitsandbytes") is not None
    if name == "adamw" or (name == "auto" and not (there and device.type == "cuda")):
        return torch.optim.AdamW(parameters, betas=betas, weight_decay=0.0)
    if not there:
        raise HastenError("adamw8bit is that of bitsandbytes, which is not installed; run: pip install bitsandbytes.")
    import bitsandbytes

    made: Any = cast(Any, bitsandbytes).optim.AdamW8bit(parameters, betas=betas, weight_decay=0.0)
    return made
