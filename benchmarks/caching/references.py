"""Pictures on disk: arrays without pickles, float32 for references and uint8 for the rest."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """Images [N, 3, H, W] in [0, 1] on their way to disk."""

    images: Tensor
    exact: bool

    def to_bytes(self) -> bytes:
        """The contents of an .npz file."""
        array = self.images.cpu().numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=array if self.exact else (array * 255).round().astype(np.uint8))
        return buffer.getvalue()


def read_pictures(path: Path) -> Tensor | None:
    """Images [N, 3, H, W] in [0, 1], or None where there are none yet."""
    file = path.with_suffix(".npz")
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as archive:
        images = torch.from_numpy(archive["images"])
    return images.float() / 255 if images.dtype == torch.uint8 else images


def folder_name(model: str, weights: str, guidance: float | None) -> str:
    """Where a model's pictures lie: other weights or another guidance scale make other pictures."""
    return f"{model}-{weights[:8]}-guidance-{guidance:g}" if guidance is not None else f"{model}-{weights[:8]}"
