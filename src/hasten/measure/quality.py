"""Fidelity: how far an image is from the same-seed image of the plain pipeline.

PSNR and SSIM (Wang et al. 2004, https://doi.org/10.1109/TIP.2003.819861) come from torchmetrics, LPIPS from
`hasten.measure.lpips`. All images are RGB with values in [0, 1]; the data range of PSNR and SSIM is 1.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

import torch
from PIL import Image
from torch import Tensor

from hasten.core.errors import BrokenOutput, HastenError
from hasten.measure.lpips import MIN_SIDE, lpips_distance

#: What the functions here accept: a PIL image, or a tensor [3, H, W], uint8 or floating in [0, 1].
ImageLike = Image.Image | Tensor

# SSIM looks through a window of this many pixels.
_SMALLEST_SIDE = 11
# About 128 pairs of 128 px at once: keeps the memory of large images bounded.
_PIXELS_PER_BATCH = 1 << 21
# Floating-point images may miss [0, 1] by the rounding of half precision.
_RANGE_SLACK = 1e-3

#: Least PSNR in dB and largest LPIPS of each word `describe_difference` uses; beyond the last it is "strong".
SCALE = (("invisible", 40.0, 0.01), ("slight", 30.0, 0.05), ("visible", 20.0, 0.25))


@dataclass(frozen=True)
class Fidelity:
    """Distance of images from their references.

    `psnr` in dB (`math.inf` for identical images), `ssim` at most 1, `lpips` from 0 (the same) to about 0.7
    (unrelated), `lpips_resolution` the short side in pixels at which LPIPS compared them.
    """

    psnr: float
    ssim: float
    lpips: float
    lpips_resolution: int = MIN_SIDE

    def to_dict(self) -> dict[str, float | None]:
        """Plain numbers that JSON can hold: the infinite PSNR of identical images becomes None."""
        return {name: finite_or_none(value) for name, value in asdict(self).items()}


def finite_or_none(value: float) -> float | None:
    """`value`, or None where it is infinite or NaN: JSON has no such numbers."""
    return value if math.isfinite(value) else None


def fidelity(image: ImageLike, reference: ImageLike, device: torch.device | str = "cpu") -> Fidelity:
    """Fidelity of one image to its reference.

    Raises `HastenError` for different sizes, values outside [0, 1] or sides under 11 px, its subclass
    `BrokenOutput` for NaN.
    """
    return fidelities([image], [reference], device)[0]


def fidelities(
    images: Sequence[ImageLike], references: Sequence[ImageLike], device: torch.device | str = "cpu"
) -> list[Fidelity]:
    """Fidelity of each image to the reference at the same place, computed on `device` in batches."""
    pairs = _checked_pairs(images, references)
    results: dict[int, Fidelity] = {}
    with torch.no_grad():
        for indices in _batches([pair[0].shape for pair in pairs]):
            left, right = (torch.stack([pairs[i][side] for i in indices]).to(device) for side in (0, 1))
            results |= zip(indices, _measure(left, right), strict=True)
    return [results[index] for index in range(len(pairs))]


def mean_fidelity(
    images: Sequence[ImageLike], references: Sequence[ImageLike], device: torch.device | str = "cpu"
) -> Fidelity:
    """The mean of the fidelities of each pair.

    The mean PSNR is taken over the pairs that differ, so that one identical pair cannot hide the others;
    it is infinite when all pairs are identical.
    """
    each = fidelities(images, references, device)
    finite = [one.psnr for one in each if math.isfinite(one.psnr)]
    return Fidelity(
        psnr=fmean(finite) if finite else math.inf,
        ssim=fmean(one.ssim for one in each),
        lpips=fmean(one.lpips for one in each),
        lpips_resolution=min(one.lpips_resolution for one in each),
    )


def noise_floor(
    images: Sequence[ImageLike], references: Sequence[ImageLike], device: torch.device | str = "cpu"
) -> Fidelity:
    """The fidelity that rounding alone leaves: plain images against plain ones from another kernel order."""
    return mean_fidelity(images, references, device)


def describe_difference(found: Fidelity, floor: Fidelity | None = None) -> str:
    """One word for a difference: "none", "invisible", "slight", "visible" or "strong".

    "none" needs a PSNR and an LPIPS at least as good as the noise floor's, without a floor identical images.
    The other words are the first line of `SCALE` whose PSNR and LPIPS are both met.
    """
    floor = floor or Fidelity(psnr=math.inf, ssim=1.0, lpips=0.0)
    if found.psnr >= floor.psnr and found.lpips <= floor.lpips:
        return "none"
    words = (word for word, psnr, lpips in SCALE if found.psnr >= psnr and found.lpips <= lpips)
    return next(words, "strong")


def _measure(left: Tensor, right: Tensor) -> list[Fidelity]:
    from torchmetrics.functional.image import (
        peak_signal_noise_ratio,
        structural_similarity_index_measure,
    )

    psnr = peak_signal_noise_ratio(left, right, data_range=1.0, reduction="none", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(left, right, data_range=1.0, reduction="none")
    assert isinstance(ssim, Tensor)
    # Rounding leaves 1e-5 of flat areas; identical images must say so.
    ssim = torch.where(psnr.isinf(), 1.0, ssim.clamp(max=1))
    lpips = lpips_distance(left, right)
    resolution = max(MIN_SIDE, min(left.shape[-2:]))
    rows = zip(psnr.tolist(), ssim.tolist(), lpips.tolist(), strict=True)
    return [Fidelity(*row, lpips_resolution=resolution) for row in rows]


def _batches(shapes: Sequence[torch.Size]) -> Iterator[list[int]]:
    """Indices of equal shape, in batches of bounded size."""
    groups: defaultdict[torch.Size, list[int]] = defaultdict(list)
    for index, shape in enumerate(shapes):
        groups[shape].append(index)
    for shape, indices in groups.items():
        step = max(1, _PIXELS_PER_BATCH // (shape[-2] * shape[-1]))
        yield from (indices[start : start + step] for start in range(0, len(indices), step))


def _checked_pairs(images: Sequence[ImageLike], references: Sequence[ImageLike]) -> list[tuple[Tensor, Tensor]]:
    if not images or not references:
        raise HastenError("fidelity needs at least one image and its reference, got an empty list")
    if len(images) != len(references):
        raise HastenError(f"{len(images)} images cannot be compared with {len(references)} references")
    pairs: list[tuple[Tensor, Tensor]] = []
    for index, (image, reference) in enumerate(zip(images, references, strict=True)):
        left, right = _as_tensor(image, f"image {index}"), _as_tensor(reference, f"reference {index}")
        if left.shape != right.shape:
            raise HastenError(f"image {index} is {_size(left)} px but its reference is {_size(right)} px")
        pairs.append((left, right))
    return pairs


def _as_tensor(image: ImageLike, name: str) -> Tensor:
    """The image as float32 [3, H, W] in [0, 1], checked."""
    pixels = _from_pil(image) if isinstance(image, Image.Image) else image.detach()
    if pixels.ndim != 3 or pixels.shape[0] != 3:
        raise HastenError(f"{name} has shape {list(pixels.shape)}; a tensor image is [3, height, width]")
    if min(pixels.shape[1:]) < _SMALLEST_SIDE:
        raise HastenError(f"{name} is {_size(pixels)} px; SSIM needs at least {_SMALLEST_SIDE} px a side")
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else _checked_range(pixels.float(), name)


def _from_pil(image: Image.Image) -> Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _checked_range(pixels: Tensor, name: str) -> Tensor:
    if bad := int((~pixels.isfinite()).sum()):
        raise BrokenOutput(f"{name} has {bad} values of {pixels.numel()} that are NaN or infinite")
    low, high = pixels.min().item(), pixels.max().item()
    if low < -_RANGE_SLACK or high > 1 + _RANGE_SLACK:
        raise HastenError(f"{name} has values from {low:.3g} to {high:.3g}; floating-point images are in [0, 1]")
    return pixels.clamp(0, 1)


def _size(pixels: Tensor) -> str:
    return f"{pixels.shape[-1]}x{pixels.shape[-2]}"
