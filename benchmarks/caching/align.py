"""Adds to each finished row how well its pictures still show what their prompts name (training/score's alignment).

    python training/emoji.py runs/data                                        # the real emoji, once
    PYTHONPATH=.peers:training python benchmarks/caching/align.py runs/data   # needs training/score/requirements.txt

Per prompt the log-probability of the right name among all names, under a head that never saw the real image of that
name and style. KID is left out: of 32 pictures it would be noise.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import torch
from emoji import load_emoji
from harness import rounded
from references import folder_name, read_pictures
from run import HERE, slug
from score.alignment import AlignmentScore
from score.features import image_features, name_vectors, over_batches, pooled
from torch import Tensor

from hasten.core.files import atomic_write_text, json_text, read_json


class Alignment:
    """The heads of training/score without its style classifier, which would take minutes more."""

    def __init__(self, data: Path, cache: Path) -> None:
        emoji = load_emoji(data)
        self.names = sorted(set(emoji.names))
        targets = torch.tensor([self.names.index(name) for name in emoji.names])
        features = [image_features(emoji.images, cache, seed) for seed in (None, 0)]
        self.score = AlignmentScore(features, targets, emoji.held_out, name_vectors(self.names), cache)
        self.rows = {pair: row for row, pair in enumerate(zip(emoji.names, emoji.styles, strict=True))}
        self.by_name = {name: row for row, name in enumerate(emoji.names)}

    def of(self, prompts: list[str], images: Tensor) -> list[float]:
        """Log-probability of the right name, in nats, for each prompt and its picture [N, 3, H, W] in [0, 1]."""
        pixels = (images * 255).round().byte().permute(0, 2, 3, 1)
        pairs = [prompt.removesuffix(" style").rpartition(", ") for prompt in prompts]
        named = [(name, style) if name else (style, "") for name, _, style in pairs]
        folds = torch.tensor([int(self.score.folds[self._real(*pair)]) for pair in named])
        similar = self.score.similarities(over_batches(pixels, pooled), folds).log_softmax(dim=1)
        return [float(row[self.names.index(name)]) for row, (name, _) in zip(similar, named, strict=True)]

    def _real(self, name: str, style: str) -> int:
        return self.rows.get((name, style), self.by_name[name])


def score_file(path: Path, alignment: Alignment, cache: Path) -> None:
    """Add `alignment` to every row of a results file whose pictures are still there."""
    content = cast("dict[str, Any]", read_json(path))
    model, steps = content["model"], content["steps"]
    prompts = [
        text for text, _ in cast("dict[str, Any]", read_json(HERE / "prompts.json"))["models"][model]["evaluation"]
    ]
    folder = folder_name(model, content["weights"], content["guidance"])
    for key, row in content["rows"].items():
        name = f"plain-{steps}" if key == "plain" else f"{steps}/{slug(key)}"
        images = read_pictures(cache / folder / name)
        if row["status"] == "ok" and images is not None:
            row["alignment"] = rounded(alignment.of(prompts[: len(images)], images))
    atomic_write_text(path, json_text(content))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    alignment = Alignment(options.data, options.out / ".cache" / "score")
    for path in sorted((options.out / "results").glob("emoji-*.json")):
        score_file(path, alignment, options.out / ".cache")


if __name__ == "__main__":
    main()
