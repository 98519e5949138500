"""LPIPS, the learned perceptual distance of two images: AlexNet features, version 0.1.

Zhang et al., "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", CVPR 2018,
https://arxiv.org/abs/1801.03924. The weights are the published ones, stored in half precision
(`weights/NOTICE.txt` says where they come from); arithmetic is in the precision asked for.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import as_file, files
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: LPIPS is nearly blind to small errors in small images: they are enlarged to this short side first.
MIN_SIDE = 128

# The image statistics LPIPS was fitted with, for inputs in [-1, 1].
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


class _Layer(NamedTuple):
    inputs: int
    outputs: int
    kernel: int
    stride: int
    padding: int
    pool_before: bool


_ALEXNET = (
    _Layer(3, 64, 11, 4, 2, pool_before=False),
    _Layer(64, 192, 5, 1, 2, pool_before=True),
    _Layer(192, 384, 3, 1, 1, pool_before=True),
    _Layer(384, 256, 3, 1, 1, pool_before=False),
    _Layer(256, 256, 3, 1, 1, pool_before=False),
)


class Lpips(nn.Module):
    """The distance network: five AlexNet stages, each with one non-negative weight per channel."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(layer.inputs, layer.outputs, layer.kernel, layer.stride, layer.padding) for layer in _ALEXNET
        )
        self.heads = nn.ParameterList(torch.zeros(layer.outputs) for layer in _ALEXNET)
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1), persistent=False)

    def features(self, images: Tensor) -> list[Tensor]:
        """The five activation maps of images in [0, 1], each pixel's channel vector of length 1."""
        hidden = (images * 2 - 1 - self.get_buffer("shift")) / self.get_buffer("scale")
        maps: list[Tensor] = []
        for layer, conv in zip(_ALEXNET, self.convs, strict=True):
            if layer.pool_before:
                hidden = F.max_pool2d(hidden, kernel_size=3, stride=2)
            hidden = F.relu(conv(hidden))
            maps.append(hidden / (torch.linalg.vector_norm(hidden, dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, images: Tensor, references: Tensor) -> Tensor:
        """Distance [N] of image batches [N, 3, H, W] in [0, 1] at the size they have: 0 for equal images."""
        maps = self.features(torch.cat([images, references]))
        distance = images.new_zeros(len(images))
        for head, both in zip(self.heads, maps, strict=True):
            left, right = both.chunk(2)
            per_channel = (left - right).square().mean(dim=(2, 3))
            distance = distance + per_channel @ head
        return distance


@cache
def load_lpips(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Lpips:
    """The network with its published weights, frozen, built once per device and precision."""
    from safetensors.torch import load_file

    with as_file(files("hasten.measure") / "weights" / "lpips_alexnet.safetensors") as path:
        weights = load_file(path)
    network = Lpips()
    network.load_state_dict(weights)
    return network.to(device=device, dtype=dtype).eval().requires_grad_(False)


def enlarge(images: Tensor, min_side: int = MIN_SIDE) -> Tensor:
    """Images [N, 3, H, W] with a short side of at least `min_side` pixels, enlarged bilinearly if smaller."""
    height, width = images.shape[-2:]
    short = min(height, width)
    if short >= min_side:
        return images
    size = (round(height * min_side / short), round(width * min_side / short))
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


@torch.no_grad()
def lpips_distance(images: Tensor, references: Tensor) -> Tensor:
    """LPIPS [N] of image pairs [N, 3, H, W] in [0, 1], at no less than `MIN_SIDE` pixels, in float32."""
    network = load_lpips(str(images.device))
    return network(enlarge(images.float()), enlarge(references.float()))
