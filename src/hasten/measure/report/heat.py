"""Difference heat maps: the absolute difference of two images, amplified and coloured."""

from __future__ import annotations

import functools
import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

#: Differences are multiplied by this before colouring, so that 64 of 255 already gets the brightest colour.
AMPLIFICATION = 4

# Hue in degrees and chroma along the map; lightness rises in a straight line between its two values.
_HUES = (285.0, 310.0, 350.0, 30.0, 62.0, 100.0)
_CHROMAS = (0.03, 0.14, 0.19, 0.19, 0.17, 0.11)
_LIGHTNESS = (0.13, 0.96)


def mean_squared_error(image: Image.Image, reference: Image.Image) -> float:
    """Mean squared difference of two RGB images of the same size, on the scale 0-255."""
    left, right = (np.asarray(one, dtype=np.float32) for one in (image, reference))
    return float(np.mean((left - right) ** 2))


def psnr(error: float) -> float:
    """PSNR in dB of a mean squared error on the scale 0-255; infinite for 0."""
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def heat_map(image: Image.Image, reference: Image.Image) -> Image.Image:
    """Mean absolute difference of the channels, times `AMPLIFICATION`, as a palette image (black is none)."""
    left, right = (np.asarray(one, dtype=np.int16) for one in (image, reference))
    difference = np.abs(left - right).mean(axis=2) * AMPLIFICATION
    levels = np.minimum(np.rint(difference), 255).astype(np.uint8)
    found = Image.fromarray(levels).convert("P")
    found.putpalette(palette().tobytes())
    return found


@functools.cache
def palette() -> NDArray[np.uint8]:
    """256 sRGB colours [256, 3] from black over violet and orange to light yellow.

    Equal steps of lightness in Oklab (Ottosson 2020, https://bottosson.github.io/posts/oklab/), so that equal
    steps of difference look equal, also without colour vision.
    """
    place = np.linspace(0, 1, 256)
    stops = np.linspace(0, 1, len(_HUES))
    hue = np.radians(np.interp(place, stops, np.unwrap(_HUES, period=360)))
    chroma = np.interp(place, stops, _CHROMAS)
    lightness = _LIGHTNESS[0] + (_LIGHTNESS[1] - _LIGHTNESS[0]) * place
    lab = np.stack([lightness, chroma * np.cos(hue), chroma * np.sin(hue)], axis=1)
    return np.rint(_to_srgb(lab) * 255).astype(np.uint8)


def css_gradient(stops: int = 12) -> str:
    """The palette as a CSS gradient from left to right."""
    chosen = palette()[np.linspace(0, 255, stops).round().astype(int)].tolist()
    return "linear-gradient(90deg," + ",".join(f"#{r:02x}{g:02x}{b:02x}" for r, g, b in chosen) + ")"


def _to_srgb(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    to_cone = np.array(
        [
            [1, 0.3963377774, 0.2158037573],
            [1, -0.1055613458, -0.0638541728],
            [1, -0.0894841775, -1.2914855480],
        ]
    )
    to_linear = np.array(
        [
            [4.0767416621, -3.3077115913, 0.2309699292],
            [-1.2684380046, 2.6097574011, -0.3413193965],
            [-0.0041960863, -0.7034186147, 1.7076147010],
        ]
    )
    linear = np.clip((lab @ to_cone.T) ** 3 @ to_linear.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
