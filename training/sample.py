"""Samples and sheets through the real diffusers pipelines, from the folders that ship, default workload."""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from emoji import EmojiSet, caption, load_emoji
from PIL import Image

SHEET = (8, 6)
SHEET_NAMES = [
    "pizza",
    "rocket",
    "red apple",
    "octopus",
    "hamburger",
    "ghost",
    "sunflower",
    "tiger face",
    "fire engine",
    "guitar",
    "robot",
    "cactus",
    "penguin",
    "airplane",
    "crown",
    "ice cream",
    "butterfly",
    "red heart",
    "snowman",
    "alarm clock",
    "bicycle",
    "owl",
    "strawberry",
    "castle",
    "dolphin",
    "cup with straw",
    "mushroom",
    "soccer ball",
    "nerd face",
    "frog",
    "umbrella with rain drops",
    "lion",
    "watermelon",
    "violin",
    "sailboat",
    "panda",
    "rainbow",
    "lollipop",
    "key",
    "skull",
    "fox",
    "volcano",
    "doughnut",
    "rose",
    "ambulance",
    "avocado",
    "thinking face",
    "birthday cake",
]
STYLE_CYCLE = ("fluent", "noto", "twemoji", "flat", "emojione", "blob")


def rows_for(name: str, emoji: EmojiSet, count: int) -> list[dict[str, Any]]:
    """What to draw for the score: seen pairs drawn at random and every held-out pair (classes for emoji-dit)."""
    rng = random.Random(0)
    rows = [
        {"caption": c, "name": n, "style": s, "held_out": h}
        for c, n, s, h in zip(emoji.captions, emoji.names, emoji.styles, emoji.held_out.tolist(), strict=True)
    ]
    if name != "emoji-dit":
        seen = [row for row in rows if not row["held_out"]]
        return rng.sample(seen, min(count, len(seen))) + [row for row in rows if row["held_out"]]
    return [{"caption": None, "name": None, "style": None, "held_out": False}] * count


def sheet_rows(name: str, labels: dict[str, int] | None) -> list[dict[str, Any]]:
    """48 well-known concepts; styles in turn."""
    names = [n for n in SHEET_NAMES if labels is None or n in labels]
    names += [n for n in sorted(labels or {})[::37] if n not in names][: len(SHEET_NAMES) - len(names)]
    styles = [STYLE_CYCLE[i % 6] for i in range(len(names))]
    return [
        {"caption": caption(n, s), "name": n, "style": s, "held_out": False} for n, s in zip(names, styles, strict=True)
    ]


class Sampler:
    """Draws rows of captions or class names with one pipeline."""

    def __init__(self, folder: Path, device: str, dtype: torch.dtype | None) -> None:
        self.name = folder.name
        self.workload = json.loads((folder / "workload.json").read_text())
        keywords = {} if dtype is None else {"torch_dtype": dtype}
        self.pipe: Any = DiffusionPipeline.from_pretrained(folder, **keywords).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.device = device
        self.labels: dict[str, int] | None = getattr(self.pipe, "labels", None)

    def draw(
        self, rows: list[dict[str, Any]], guidance: float | None = None, steps: int | None = None, batch: int = 128
    ) -> np.ndarray:
        """uint8 [N, 128, 128, 3]; image i uses seed i."""
        keywords = {
            "num_inference_steps": steps or self.workload["steps"],
            "guidance_scale": guidance if guidance is not None else self.workload["guidance"],
            "output_type": "np",
        }
        if self.name != "emoji-dit":
            keywords |= {"width": self.workload["width"], "height": self.workload["height"]}
        if self.workload["max_sequence_length"]:
            keywords["max_sequence_length"] = self.workload["max_sequence_length"]
        parts = []
        for start in range(0, len(rows), batch):
            chunk = rows[start : start + batch]
            seeds = [torch.Generator("cpu").manual_seed(start + i) for i in range(len(chunk))]
            parts.append(self.pipe(self.conditions(chunk), generator=seeds, **keywords).images)
        return (np.concatenate(parts) * 255).round().astype(np.uint8)

    def conditions(self, rows: list[dict[str, Any]]) -> list[Any]:
        """Captions, or class numbers."""
        if self.labels is None:
            return [row["caption"] for row in rows]
        return [self.labels[row["name"]] for row in rows]


def grid(images: np.ndarray, columns: int, path: Path) -> None:
    """One lossless WebP with all images in a grid, of 112 colours."""
    height = -(-len(images) // columns)
    canvas = np.full((height * 128, columns * 128, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = divmod(i, columns)
        canvas[y * 128 : (y + 1) * 128, x * 128 : (x + 1) * 128] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    # Few colours keep the sheet small: the folder counts toward the size of the package.
    sheet = Image.fromarray(canvas).quantize(112, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    sheet.convert("RGB").save(path, "WEBP", lossless=True, quality=100, method=6)


def sweep(sampler: Sampler, path: Path, values: tuple[float, ...] = (1.0, 2.0, 3.0, 4.5, 6.0)) -> None:
    """A row of prompts per guidance value: how the default was chosen."""
    rows = sheet_rows(sampler.name, sampler.labels)[:12]
    grid(np.concatenate([sampler.draw(rows, guidance=w) for w in values]), len(rows), path)


def evaluation(sampler: Sampler, emoji: EmojiSet, count: int, out: Path) -> None:
    """images.npz and captions.json for the score."""
    rows = rows_for(sampler.name, emoji, count)
    if sampler.labels is not None:
        names = sorted(sampler.labels)
        rows = [{"caption": n, "name": n, "style": None, "held_out": False} for n in (names * count)[:count]]
    images = sampler.draw(rows)
    out.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out / "images.npz", images=images)
    (out / "captions.json").write_text(json.dumps(rows, indent=0))
    print(sampler.name, images.shape, (out / "images.npz").stat().st_size, "bytes", flush=True)


def main() -> None:
    """Command line: see README.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="a model folder")
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--sheet-only", action="store_true")
    parser.add_argument("--sweep", action="store_true")
    args = parser.parse_args()
    sampler = Sampler(args.folder, "cuda" if torch.cuda.is_available() else "cpu", None)
    rows = sheet_rows(sampler.name, sampler.labels)
    grid(sampler.draw(rows), SHEET[0], args.out / "samples.webp")
    if args.sweep:
        sweep(sampler, args.out / "sweep.webp")
    if not args.sheet_only:
        evaluation(sampler, load_emoji(args.data), args.count, args.out)


if __name__ == "__main__":
    main()
