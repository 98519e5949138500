"""A small style classifier: logistic regression on the palette and on early features of EfficientNet-Lite0.

What sets the emoji sets apart is mostly their palette, then lines, shading and margins. The classifier that judges an
image was not fitted with any image of the same concept, and two thirds of its training images are softened copies
(damage.py), so that it does not hang on exact colour values. All of them are real images.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from score.cache import digest, remember
from score.features import features_of, network

FOLDS = 5
BINS = (6, 12)
STAGES = (0, 2, 4, 7)
FLAT = (0.004, 0.01, 0.02, 0.04, 0.1, 0.2)
PENALTY = 0.01
COPIES = 2


def palette(pixels: Tensor, bins: int) -> Tensor:
    """Square root of the colour histogram [N, bins^3] of all but white pixels, shared out trilinearly."""
    place = pixels.flatten(2) * (bins - 1)
    low = place.floor().clamp(max=bins - 2)
    part, low = place - low, low.long()
    drawn = (pixels.flatten(2).amin(dim=1) < 0.97).float()
    histogram = pixels.new_zeros(len(pixels), bins**3)
    for corner in range(8):
        steps = [corner >> channel & 1 for channel in range(3)]
        weight, index = drawn, torch.zeros_like(low[:, 0])
        for channel, step in enumerate(steps):
            weight = weight * (part[:, channel] if step else 1 - part[:, channel])
            index = index * bins + low[:, channel] + step
        histogram.scatter_add_(1, index, weight)
    return (histogram / (histogram.sum(dim=1, keepdim=True) + 1e-3)).sqrt()


def texture(pixels: Tensor) -> Tensor:
    """Mean and spread of every channel after the stem and after a few early blocks."""
    net = network()
    hidden = F.relu6(net._bn0(net._conv_stem((pixels * 255 - 127) / 128)))
    found = [hidden.mean(dim=(2, 3)), hidden.std(dim=(2, 3))]
    for index, block in enumerate(net._blocks[: STAGES[-1] + 1]):
        hidden = block(hidden)
        if index in STAGES:
            found += [hidden.mean(dim=(2, 3)), hidden.std(dim=(2, 3))]
    return torch.cat(found, dim=1)


def layout(pixels: Tensor) -> Tensor:
    """Where something is drawn: coverage of a 16x16 grid and the outline's extent along both axes."""
    ink = (4 * (1 - pixels.amin(dim=1, keepdim=True))).clamp(0, 1)
    extents = [ink.amax(dim=axis).flatten(1)[:, ::4] for axis in (2, 3)]
    return torch.cat([F.adaptive_avg_pool2d(ink, 16).flatten(1), *extents, ink.mean(dim=(2, 3))], dim=1)


def flatness(pixels: Tensor) -> Tensor:
    """Share of what is drawn whose horizontal change stays under each of six thresholds."""
    change = (pixels[..., 1:] - pixels[..., :-1]).abs().amax(dim=1)
    drawn = (pixels.amin(dim=1) < 0.97).float()[..., 1:]
    shares = [((change < limit) * drawn).sum(dim=(1, 2)) / (drawn.sum(dim=(1, 2)) + 1) for limit in FLAT]
    return torch.stack(shares, dim=1)


def describe(pixels: Tensor) -> Tensor:
    """All style features of images [N, 3, 128, 128] in [0, 1]."""
    palettes = [palette(pixels, bins) for bins in BINS]
    return torch.cat([texture(pixels), *palettes, layout(pixels), flatness(pixels)], dim=1)


def style_features(images: Tensor, cache: Path, seed: int | None = None) -> Tensor:
    """Style features of images uint8 [N, H, W, 3], or (with a seed) of softened copies, remembered."""
    return features_of("style", describe, images, cache, seed)


def fit(features: Tensor, styles: Tensor, classes: int) -> dict[str, Tensor]:
    """Multinomial logistic regression with a quadratic penalty, on standardised features."""
    mean, spread = features.mean(dim=0), features.std(dim=0) + 1e-3
    scaled = (features - mean) / spread
    weight = torch.zeros(features.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(scaled @ weight + bias, styles) + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return {"mean": mean, "spread": spread, "weight": weight.detach(), "bias": bias.detach()}


class StyleClassifier:
    """Cross-fitted over concepts: classifier k was fitted without the concepts of fold k."""

    def __init__(self, images: Tensor, styles: Tensor, concepts: Tensor, cache: Path) -> None:
        self.classes, count = int(styles.max()) + 1, int(concepts.max()) + 1
        self.fold_of_concept = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % FOLDS
        self.cache = cache
        features = [style_features(images, cache, seed) for seed in (None, *range(COPIES))]
        folds = self.fold_of_concept[concepts]
        self.models = [
            self._model([part[folds != fold] for part in features], styles[folds != fold]) for fold in range(FOLDS)
        ]

    def _model(self, features: list[Tensor], styles: Tensor) -> dict[str, Tensor]:
        key = digest(*features, styles, f"{PENALTY}")
        path = self.cache / f"style-model-{key}.safetensors"
        return remember(path, lambda: fit(torch.cat(features), styles.repeat(len(features)), self.classes))

    def predict(self, features: Tensor, concepts: Tensor) -> Tensor:
        """The most likely style of each image, given which concept it shows."""
        scores = features.new_zeros(len(features), self.classes)
        folds = self.fold_of_concept[concepts]
        for fold, model in enumerate(self.models):
            chosen = folds == fold
            scores[chosen] = (features[chosen] - model["mean"]) / model["spread"] @ model["weight"] + model["bias"]
        return scores.argmax(dim=1)
