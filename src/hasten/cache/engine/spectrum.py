"""A picture seen through the noise: a Wiener-like filter in the frequency domain.

Pictures have a power spectrum that falls with the frequency f as f^-p; noise is white. At flow time s the input is
(1-s)*x0 + s*noise, so a frequency carries the gain (1-s)*P / ((1-s)^2*P + s^2) with P = f^-p: early in sampling only
coarse structure passes. Source: SeaCache (arXiv:2602.18993), equations 5 to 7.
"""

from __future__ import annotations

import torch

from hasten.core.noise import NoiseLevel

POWER = 3.0
"""Exponent p, as published."""
_TINY = 1e-16


def filtered(picture: torch.Tensor, level: NoiseLevel, power: float = POWER) -> torch.Tensor:
    """The structure that a noisy picture [batch, channels, (frames,) rows, columns] shows, float32, same shape.

    The gain is the product over the axes, divided by its mean, so that distances at different steps compare.
    """
    axes = tuple(range(2, picture.dim()))
    sizes = [picture.shape[axis] for axis in axes]
    spectrum = torch.fft.rfftn(picture.float() / level.scale, dim=axes)
    for axis, size in zip(axes, sizes, strict=True):
        gain = _gain(size, level.flow_time, power, picture.device)
        shape = [1] * picture.dim()
        shape[axis] = spectrum.shape[axis]
        spectrum = spectrum * gain[: spectrum.shape[axis]].reshape(shape)
    return torch.fft.irfftn(spectrum, s=sizes, dim=axes)


def _gain(size: int, flow_time: float, power: float, device: torch.device) -> torch.Tensor:
    """Gain of every frequency of one axis, of mean 1; the mean of a product over axes is the product of the means."""
    noise = min(max(flow_time, 1e-6), 1.0 - 1e-6)
    signal = 1.0 - noise
    clean = 1.0 / (torch.fft.fftfreq(size, device=device).abs().pow(power) + _TINY)
    gain = signal * clean / (signal**2 * clean + noise**2 + _TINY)
    return gain / gain.mean()
