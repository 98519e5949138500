"""Scores a folder of generated samples against the real emoji."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from emoji import EmojiSet
from torch import Tensor

from hasten.measure.lpips import lpips_distance
from score.alignment import AlignmentScore, rank_of, retrieval
from score.features import image_features, name_vectors
from score.kid import Kid, kid, subset_size
from score.style import StyleClassifier, style_features

COPY = 0.1
WORST = 12


@dataclass(frozen=True)
class Samples:
    """Images uint8 [N, H, W, 3] and, for each, the name, the style (None: not asked for) and the split."""

    images: Tensor
    names: list[str]
    styles: list[str | None]
    held_out: Tensor

    def subset(self, rows: Tensor) -> Samples:
        """The samples at the places where `rows` is true."""
        places = rows.nonzero()[:, 0].tolist()
        names, styles = [self.names[i] for i in places], [self.styles[i] for i in places]
        return Samples(self.images[rows], names, styles, self.held_out[rows])


def load_samples(folder: Path) -> Samples:
    """Read `images.npz` and `captions.json`."""
    rows = json.loads((folder / "captions.json").read_text())
    with np.load(folder / "images.npz") as archive:
        images = torch.from_numpy(archive["images"])
    if len(images) != len(rows):
        raise SystemExit(f"{folder}: {len(images)} images but {len(rows)} captions")
    held_out = torch.tensor([bool(row["held_out"]) for row in rows])
    return Samples(images, [row["name"] for row in rows], [row["style"] for row in rows], held_out)


def mean_by(keys: Sequence[str], values: Tensor) -> dict[str, float]:
    """Mean of `values` for each distinct key, largest first."""
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for key, value in zip(keys, values.tolist(), strict=True):
        groups[key].append(float(value))
    means = {key: sum(found) / len(found) for key, found in groups.items()}
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def distances(left: Tensor, right: Tensor) -> Tensor:
    """LPIPS at 128 px of images uint8 [N, H, W, 3], pair by pair."""
    return lpips_distance(left.permute(0, 3, 1, 2) / 255, right.permute(0, 3, 1, 2) / 255)


class Judge:
    """The real images, their features and everything fitted to them."""

    def __init__(self, emoji: EmojiSet, cache: Path) -> None:
        self.emoji, self.cache = emoji, cache
        self.names, self.styles = sorted(set(emoji.names)), sorted(set(emoji.styles))
        self.features = image_features(emoji.images, cache)
        versions = [self.features, image_features(emoji.images, cache, seed=0)]
        self.targets = self.name_index(emoji.names)
        self.row_of = {pair: i for i, pair in enumerate(zip(emoji.names, emoji.styles, strict=True))}
        vectors = name_vectors(self.names)
        self.alignment = AlignmentScore(versions, self.targets, emoji.held_out, vectors, cache)
        self.classifier = StyleClassifier(emoji.images, self.style_index(emoji.styles), self.targets, cache)

    def name_index(self, names: Iterable[str]) -> Tensor:
        """The place of each name among the distinct names."""
        places = {name: i for i, name in enumerate(self.names)}
        return torch.tensor([places[name] for name in names])

    def style_index(self, styles: Iterable[str | None]) -> Tensor:
        """The place of each style among the distinct styles."""
        return torch.tensor([self.styles.index(style or "") for style in styles])

    def real_rows(self, samples: Samples, features: Tensor) -> Tensor:
        """The real image of each sample's caption; without a style, the nearest real image of its name."""
        rows: list[int] = []
        for name, style, feature in zip(samples.names, samples.styles, features, strict=True):
            rows.append(self.row_of[name, style] if style else self._nearest(name, feature))
        return torch.tensor(rows)

    def _nearest(self, name: str, feature: Tensor) -> int:
        rows = (self.targets == self.names.index(name)).nonzero()[:, 0]
        return int(rows[(self.features[rows] - feature).norm(dim=1).argmin()])

    def references(self, samples: Samples, styles: Sequence[str]) -> Tensor:
        """Which real images a model that draws these names in these styles could have drawn."""
        names = set(samples.names)
        pairs = zip(self.emoji.names, self.emoji.styles, strict=True)
        return torch.tensor([name in names and style in styles for name, style in pairs])

    def score(self, samples: Samples, styles: Sequence[str] | None = None) -> dict[str, Any]:
        """All scores of a model that draws `styles` (all of them unless said)."""
        styles = styles or self.styles
        features = image_features(samples.images, self.cache)
        rows = self.real_rows(samples, features)
        splits = {"seen": ~samples.held_out, "held_out": samples.held_out}
        if bool(samples.held_out.any()):
            splits["all"] = torch.ones_like(samples.held_out)
        found = {
            split: self._score_split(samples.subset(chosen), features[chosen], rows[chosen], styles)
            for split, chosen in splits.items()
            if chosen.sum() > 1
        }
        return {"count": len(samples.names), "names": len(set(samples.names)), "styles": list(styles), **found}

    def _score_split(self, samples: Samples, features: Tensor, rows: Tensor, styles: Sequence[str]) -> dict[str, Any]:
        real = self.references(samples, styles)
        if bool(samples.held_out.all()):
            real = real & self.emoji.held_out
        found: dict[str, Any] = {"count": len(samples.names), "kid": self._kid(features, rows, real)}
        found["alignment"] = self._alignment(samples, features, rows, real)
        found["nearest"] = self._copies(samples.images, rows)
        if all(samples.styles):
            found["style"] = self._style(samples, rows)
        return found

    def kid_against(self, features: Tensor, rows: Tensor, real: Tensor, subset: int) -> Kid:
        """KID of features of the captions `rows` against the real images `real` (numbers too)."""
        return kid(features, rows, self.features[real], real, subset)

    def _kid(self, features: Tensor, rows: Tensor, real: Tensor) -> dict[str, Any]:
        chosen = real.nonzero()[:, 0]
        subset = subset_size(len(features), len(chosen))
        found = self.kid_against(features, rows, chosen, subset)
        floor = self.kid_against(self.features[chosen], chosen, chosen, subset)
        return {"samples": asdict(found), "floor": asdict(floor), "real_images": len(chosen)}

    def _alignment(self, samples: Samples, features: Tensor, rows: Tensor, real: Tensor) -> dict[str, Any]:
        targets, folds = self.name_index(samples.names), self.alignment.folds
        similar = self.alignment.similarities(features, folds[rows])
        twins = rows.unique() if all(samples.styles) else real.nonzero()[:, 0]
        genuine = self.alignment.similarities(self.features[twins], folds[twins])
        drawn, real_score = retrieval(similar, targets), retrieval(genuine, self.targets[twins])
        ranks = rank_of(similar, targets)
        groups = [self.emoji.groups[row] for row in rows.tolist()]
        return {
            "samples": asdict(drawn),
            "real": asdict(real_score),
            "share_of_real": drawn.top1 / real_score.top1,
            "chance": 1 / len(self.names),
            "by_group": mean_by(groups, (ranks == 0).float()),
            "worst": self._worst(samples, ranks, similar),
        }

    def _worst(self, samples: Samples, ranks: Tensor, similar: Tensor) -> list[dict[str, Any]]:
        worst = ranks.argsort(descending=True, stable=True)[:WORST].tolist()
        guesses = similar.argmax(dim=1).tolist()
        return [
            {
                "name": samples.names[i],
                "style": samples.styles[i],
                "rank": int(ranks[i]) + 1,
                "taken_for": self.names[guesses[i]],
            }
            for i in worst
        ]

    def _style(self, samples: Samples, rows: Tensor) -> dict[str, Any]:
        wanted, concepts = self.style_index(samples.styles), self.name_index(samples.names)
        right = (self.classifier.predict(style_features(samples.images, self.cache), concepts) == wanted).float()
        twins = rows.unique()
        real = self.classifier.predict(style_features(self.emoji.images, self.cache)[twins], self.targets[twins])
        genuine = (real == self.style_index(self.emoji.styles[i] for i in twins.tolist())).float()
        drawing = self._drawing(samples)
        by_style = mean_by([style or "" for style in samples.styles], right)
        return {"samples": right.mean().item(), "real": genuine.mean().item(), "by_style": by_style, **drawing}

    def _drawing(self, samples: Samples) -> dict[str, float]:
        """How often, of all real drawings of a sample's concept, the nearest (LPIPS) is in the style asked for."""
        right, chance = 0, 0.0
        for image, name, style in zip(samples.images, samples.names, samples.styles, strict=True):
            rows = (self.targets == self.names.index(name)).nonzero()[:, 0]
            nearest = rows[distances(image.expand(len(rows), -1, -1, -1), self.emoji.images[rows]).argmin()]
            right += self.emoji.styles[int(nearest)] == style
            chance += 1 / len(rows)
        return {"nearest_drawing": right / len(samples.names), "nearest_drawing_chance": chance / len(samples.names)}

    def _copies(self, images: Tensor, rows: Tensor) -> dict[str, float]:
        """LPIPS (128 px) between each sample and the real image of its caption."""
        pairs = zip(images.split(32), self.emoji.images[rows].split(32), strict=True)
        every = torch.cat([distances(drawn, real) for drawn, real in pairs])
        return {"lpips_median": every.median().item(), "copies": (every < COPY).float().mean().item()}
