"""Real images as a decoder might have drawn them: what the scores must not be thrown by."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def blur(pixels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur with `sigma` in pixels."""
    offsets = torch.arange(-4.0, 5.0)
    weights = torch.exp(-offsets.square() / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, 9)
    across = F.conv2d(F.pad(pixels, (4, 4, 0, 0), mode="replicate"), weights, groups=3)
    return F.conv2d(F.pad(across, (0, 0, 4, 4), mode="replicate"), weights.transpose(2, 3), groups=3)


def soften(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A copy as a decoder might have drawn it: blurred, slightly tinted (white stays white), with faint noise."""
    sigma = 0.4 + 0.6 * torch.rand(1, generator=generator).item()
    tint = 1 + 0.05 * torch.randn(len(pixels), 3, 1, 1, generator=generator)
    noise = 0.012 * torch.randn(pixels.shape, generator=generator)
    return ((blur(pixels, sigma) - 1) * tint + 1 + noise).clamp(0, 1)
