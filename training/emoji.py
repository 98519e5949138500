"""The emoji training set: SVG icons of six permissively licensed sets, rasterised at 128x128 on white.

Run as a program to build the folder (``python training/emoji.py OUT``); use `load_emoji` to read it.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tarfile
import unicodedata
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from concepts import keeps

SIZE = 128
# style word in captions -> npm package; each is pinned, see README.md for licences
STYLES = {
    "noto": "@iconify-json/noto@1.2.9",
    "blob": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "flat": "@iconify-json/fluent-emoji-flat@1.2.6",
}
NAMES = "unicode-emoji-json@0.9.0"
HELD_OUT_SHARE = 0.05
CACHE = Path(__file__).parent / ".cache"


@dataclass(frozen=True)
class EmojiSet:
    """Images uint8 [N, 128, 128, 3] with, per image, concept name, style word, caption and split."""

    images: torch.Tensor
    names: list[str]
    styles: list[str]
    captions: list[str]
    held_out: torch.Tensor
    groups: list[str]

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Icon:
    """One icon before rasterising."""

    name: str
    style: str
    group: str
    svg: str


def caption(name: str, style: str) -> str:
    """The canonical caption of a (concept, style) pair."""
    return f"{name}, {style} style"


def load_emoji(folder: str | Path) -> EmojiSet:
    """Read a folder written by `build`."""
    folder = Path(folder)
    table = json.loads((folder / "emoji.json").read_text())
    with np.load(folder / "images.npz") as archive:
        images = torch.from_numpy(archive["images"])
    rows = table["rows"]
    names, styles = [row["name"] for row in rows], [row["style"] for row in rows]
    held_out = torch.tensor([row["held_out"] for row in rows])
    captions = [caption(n, s) for n, s in zip(names, styles, strict=True)]
    return EmojiSet(images, names, styles, captions, held_out, [row["group"] for row in rows])


def fetch(package: str) -> Path:
    """Download one pinned npm package into the cache folder; returns the archive."""
    name, version = package.rsplit("@", 1)
    archive = CACHE / f"{name.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not archive.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", package], cwd=CACHE, check=True)
    return archive


def read_json(archive: Path, member: str) -> Any:
    """One JSON file out of an npm archive."""
    with tarfile.open(archive) as tar:
        handle = tar.extractfile(f"package/{member}")
        if handle is None:
            raise FileNotFoundError(f"{member} is not in {archive.name}")
        return json.load(handle)


def plain(name: str) -> str:
    """A Unicode name in lower-case ASCII words: "Woman's hat" stays readable, accents are dropped."""
    name = name.lower().replace("\u2019", "'").replace("\u201c", "").replace("\u201d", "").replace(":", "")
    return unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()


def unicode_concepts() -> dict[str, tuple[str, str]]:
    """Squashed slug -> (concept name, group): the key under which all sets meet."""
    table = read_json(fetch(NAMES), "data-by-emoji.json").values()
    return {row["slug"].replace("_", "").replace("-", ""): (plain(row["name"]), row["group"]) for row in table}


def to_svg(icon: dict[str, Any], defaults: dict[str, Any]) -> str:
    """A complete SVG document from an Iconify fragment."""
    box = [
        icon.get(key, defaults.get(key, fall)) for key, fall in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    ]
    view = " ".join(str(value) for value in box)
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{view}">{icon["body"]}</svg>'


def icons_of(style: str, concepts: dict[str, tuple[str, str]]) -> list[Icon]:
    """All icons of one set that stand for a Unicode concept, aliases included."""
    data = read_json(fetch(STYLES[style]), "icons.json")
    names = {name: name for name in data["icons"]}
    for alias, entry in data.get("aliases", {}).items():
        names.setdefault(alias, entry["parent"])
    found: dict[str, Icon] = {}
    for name, parent in names.items():
        key = name.replace("-", "")
        if key in concepts and key not in found and parent in data["icons"]:
            label, group = concepts[key]
            found[key] = Icon(label, style, group, to_svg(data["icons"][parent], data))
    return list(found.values())


def rasterise(svg: str) -> np.ndarray:
    """SVG text to uint8 [128, 128, 3] on white."""
    import resvg_py
    from PIL import Image

    data = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE)
    picture = Image.open(BytesIO(bytes(data))).convert("RGBA")
    canvas = Image.new("RGBA", (SIZE, SIZE), "white")
    offset = ((SIZE - picture.width) // 2, (SIZE - picture.height) // 2)
    canvas.alpha_composite(picture.crop((0, 0, min(picture.width, SIZE), min(picture.height, SIZE))), offset)
    return np.asarray(canvas.convert("RGB"))


def curate(icons: list[Icon]) -> list[Icon]:
    """Keep the concepts that `concepts.keeps` wants, given how many styles draw them."""
    count: dict[str, int] = defaultdict(int)
    for icon in icons:
        count[icon.name] += 1
    return [icon for icon in icons if keeps(icon.name, icon.group, count[icon.name])]


def distinct(icons: list[Icon], images: list[np.ndarray]) -> tuple[list[Icon], list[np.ndarray]]:
    """Drop blank pictures and exact duplicates (the first one stays)."""
    seen: set[str] = set()
    kept: list[tuple[Icon, np.ndarray]] = []
    for icon, image in zip(icons, images, strict=True):
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        if image.min() < 250 and digest not in seen:
            kept.append((icon, image))
        seen.add(digest)
    return [icon for icon, _ in kept], [image for _, image in kept]


def split(icons: list[Icon]) -> list[bool]:
    """Hold out whole (concept, style) pairs: at most one per concept, the concept seen in >= 3 other styles.

    The choice is a hash of the pair, so it does not move when other concepts come or go.
    """
    by_name: dict[str, list[Icon]] = defaultdict(list)
    for icon in icons:
        by_name[icon.name].append(icon)
    chosen: set[tuple[str, str]] = set()
    for name, group in by_name.items():
        score = {
            icon.style: int(hashlib.sha256(f"{name}/{icon.style}".encode()).hexdigest()[:8], 16) / 2**32
            for icon in group
        }
        style = min(score, key=lambda key: score[key])
        if len(group) >= 4 and score[style] < HELD_OUT_SHARE:
            chosen.add((name, style))
    return [(icon.name, icon.style) in chosen for icon in icons]


def build(folder: str | Path, workers: int = os.cpu_count() or 1) -> None:
    """Fetch, filter, rasterise, split and write ``images.npz`` + ``emoji.json`` into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    concepts = unicode_concepts()
    icons = curate([icon for style in STYLES for icon in icons_of(style, concepts)])
    with ProcessPoolExecutor(workers) as pool:
        images = list(pool.map(rasterise, [icon.svg for icon in icons], chunksize=32))
    icons, images = distinct(icons, images)
    order = sorted(range(len(icons)), key=lambda i: (icons[i].name, icons[i].style))
    icons, images = [icons[i] for i in order], [images[i] for i in order]
    rows = [
        {"name": i.name, "style": i.style, "group": i.group, "held_out": held}
        for i, held in zip(icons, split(icons), strict=True)
    ]
    np.savez_compressed(folder / "images.npz", images=np.stack(images))
    (folder / "emoji.json").write_text(json.dumps({"styles": list(STYLES), "rows": rows}, indent=0))
    held = sum(row["held_out"] for row in rows)
    print(f"{len(rows)} images, {len({r['name'] for r in rows})} concepts, {held} held out -> {folder}")


if __name__ == "__main__":
    import sys

    build(sys.argv[1])
