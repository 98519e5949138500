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


def patches(count: int, cells: int, strength: float, generator: torch.Generator) -> Tensor:
    """Smooth random colour offsets [count, 3, 128, 128]; every image draws its own strength up to `strength`."""
    coarse = torch.randn(count, 3, cells, cells, generator=generator)
    smooth = F.interpolate(coarse, size=(128, 128), mode="bicubic")
    return smooth * strength * torch.rand(count, 1, 1, 1, generator=generator)


def soften(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """A copy [N, 3, 128, 128] as a generator might have drawn it.

    Blurred, with blotches in what should be flat, slightly tinted (white stays white), more saturated (which is what
    guidance does) and with faint noise.
    """
    count = len(pixels)
    drawn = blur(pixels, 0.4 + 0.7 * torch.rand(1, generator=generator).item())
    blotches = patches(count, 5, 0.06, generator) + patches(count, 20, 0.05, generator)
    ink = (1 - drawn.amin(dim=1, keepdim=True)).clamp(0, 0.25) * 4
    drawn = drawn + blotches * (0.15 + 0.85 * ink)
    drawn = (drawn - 1) * (1 + 0.06 * torch.randn(count, 3, 1, 1, generator=generator)) + 1
    grey = drawn.mean(dim=1, keepdim=True)
    drawn = grey + (drawn - grey) * (0.9 + 0.6 * torch.rand(count, 1, 1, 1, generator=generator))
    noise = torch.randn(pixels.shape, generator=generator) * torch.rand(count, 1, 1, 1, generator=generator)
    return (drawn + 0.01 * noise).clamp(0, 1)
