"""Checks the scores on real images, before any sample is judged: they must move the right way and stop at chance."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from score.alignment import retrieval
from score.damage import blur, soften
from score.features import image_features, over_batches
from score.judge import Judge
from score.kid import subset_size
from score.style import style_features

KID_SUBSET = 250


def as_bytes(pixels: Tensor) -> Tensor:
    """Images [N, 3, H, W] in [0, 1] as uint8 [N, H, W, 3]."""
    return (pixels * 255).round().byte().permute(0, 2, 3, 1)


def autoencoded(pixels: Tensor) -> Tensor:
    """Encoded and decoded by the autoencoder that all bundled models share: the best a sample can look."""
    decoded = autoencoder()(pixels * 2 - 1).sample
    return as_bytes((decoded / 2 + 0.5).clamp(0, 1))


@cache
def autoencoder() -> Any:
    """The autoencoder of the bundled models, in single precision."""
    import diffusers

    folder = Path(__file__).resolve().parents[2] / "src" / "hasten" / "models" / "emoji-flux" / "vae"
    return diffusers.AutoencoderKL.from_pretrained(folder).float().eval()


def damaged(images: Tensor) -> dict[str, Tensor]:
    """Real images as a mediocre model might draw them."""
    generator = torch.Generator().manual_seed(1)

    def noisy(pixels: Tensor, level: int) -> Tensor:
        return as_bytes((pixels + torch.randn(pixels.shape, generator=generator) * level / 255).clamp(0, 1))

    return {
        "through the autoencoder": over_batches(images, autoencoded),
        "softened": over_batches(images, lambda x: as_bytes(soften(x, generator))),
        "blur 2 px": over_batches(images, lambda x: as_bytes(blur(x, 2.0))),
        "noise sd 3/255": over_batches(images, lambda x: noisy(x, 3)),
        "noise sd 16/255": over_batches(images, lambda x: noisy(x, 16)),
    }


def scores_of(judge: Judge, features: Tensor, look: Tensor, places: Tensor) -> dict[str, float]:
    """KID, retrieval and style of (changed) real images that stand at `places` of the set."""
    targets = judge.targets[places]
    found = retrieval(judge.alignment.similarities(features, judge.alignment.folds[places]), targets)
    wanted = judge.style_index(judge.emoji.styles[i] for i in places.tolist())
    right = judge.classifier.predict(look, targets) == wanted
    every = torch.arange(len(judge.targets))
    distance = judge.kid_against(features, places, every, subset_size(len(places), len(every)))
    return {"kid": distance.mean, "top1": found.top1, "top5": found.top5, "style": right.float().mean().item()}


def damaged_scores(judge: Judge, count: int) -> dict[str, dict[str, float]]:
    """Scores of `count` real images after each kind of damage."""
    places = torch.randperm(len(judge.targets), generator=torch.Generator().manual_seed(3))[:count]
    found: dict[str, dict[str, float]] = {}
    for kind, images in damaged(judge.emoji.images[places]).items():
        features, look = image_features(images, judge.cache), style_features(images, judge.cache)
        found[kind] = scores_of(judge, features, look, places)
    return found


def wrong_captions(judge: Judge) -> dict[str, float]:
    """What images get for captions that are not theirs: chance."""
    order = torch.randperm(len(judge.targets), generator=torch.Generator().manual_seed(2))
    similar = judge.alignment.similarities(judge.features, judge.alignment.folds)
    found = retrieval(similar, judge.targets[order])
    styles = judge.style_index(judge.emoji.styles)
    right = judge.classifier.predict(style_features(judge.emoji.images, judge.cache), judge.targets) == styles[order]
    return {"top1": found.top1, "top5": found.top5, "style": right.float().mean().item()}


def one_style(judge: Judge) -> dict[str, float]:
    """KID of each style's real images against all: a model stuck in one style."""
    styles = judge.style_index(judge.emoji.styles)
    every = torch.arange(len(styles))
    rows = {style: (styles == i).nonzero()[:, 0] for i, style in enumerate(judge.styles)}
    return {style: judge.kid_against(judge.features[own], own, every, KID_SUBSET).mean for style, own in rows.items()}


def real_scores(judge: Judge) -> dict[str, dict[str, float]]:
    """Real images as if they were samples, seen and held out."""
    look = style_features(judge.emoji.images, judge.cache)
    splits = {"seen": ~judge.emoji.held_out, "held_out": judge.emoji.held_out}
    places = {split: chosen.nonzero()[:, 0] for split, chosen in splits.items()}
    return {split: scores_of(judge, judge.features[rows], look[rows], rows) for split, rows in places.items()}


def validate(judge: Judge, count: int = 512) -> dict[str, Any]:
    """Everything above; `count` images are damaged."""
    every = torch.arange(len(judge.targets))
    floor = judge.kid_against(judge.features, every, every, KID_SUBSET)
    return {
        "kid_subset": KID_SUBSET,
        "kid_floor": {"mean": floor.mean, "spread": floor.spread},
        "real": real_scores(judge),
        "damaged": damaged_scores(judge, count),
        "wrong_captions": wrong_captions(judge),
        "kid_of_one_style": one_style(judge),
    }
