"""The images of a comparison as data URIs, small enough for one file, each with its difference heat map."""

from __future__ import annotations

import base64
import io
import itertools
import math
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from hasten.measure.comparison import Comparison
from hasten.measure.report import heat

#: Characters that all embedded images may take together.
BUDGET = 12_000_000
_HEAT_SIDE = 512
_BROWSER_FORMATS = {"PNG": "image/png", "WEBP": "image/webp", "JPEG": "image/jpeg"}


@dataclass(frozen=True)
class Encoding:
    """How images are embedded: as they are, or as WebP of a quality and at most `side` pixels a side."""

    quality: int | None = None
    side: int | None = None

    @property
    def note(self) -> str:
        """What was done to the images, as a sentence; empty for nothing."""
        if self.quality is None:
            return ""
        size = f", at most {self.side} px a side" if self.side else ""
        return (
            f"To keep this file small its images are WebP copies (quality {self.quality}{size}); "
            "the heat maps and all figures come from the original files beside it."
        )


_LADDER = (
    Encoding(),
    Encoding(quality=92),
    Encoding(quality=92, side=768),
    Encoding(quality=90, side=512),
    Encoding(quality=85, side=320),
    Encoding(quality=80, side=192),
)


@dataclass(frozen=True)
class Picture:
    """One image of one row; `problem` says why `uri` is missing, `psnr` compares it with the baseline's."""

    uri: str | None = None
    heat: str | None = None
    psnr: float | None = None
    problem: str | None = None

    @property
    def identical(self) -> bool:
        """True when the files of this image and the baseline's hold the same pixels."""
        return self.psnr == math.inf

    @property
    def size(self) -> int:
        """Characters taken in the report."""
        return len(self.uri or "") + len(self.heat or "")


@dataclass(frozen=True)
class Gallery:
    """Pictures by (row, image) and what was done to make them fit."""

    pictures: dict[tuple[int, int], Picture] = field(default_factory=dict)
    note: str = ""

    @property
    def size(self) -> int:
        """Characters taken by all pictures."""
        return sum(picture.size for picture in self.pictures.values())


def build_gallery(comparison: Comparison, folder: Path, budget: int = BUDGET) -> Gallery:
    """Encode every image with as little loss as the budget allows; a missing file leaves a word instead."""
    for encoding in _LADDER[:-1]:
        found = _encoded(comparison, folder, encoding, budget, partly=False)
        if found is not None:
            return Gallery(found, encoding.note)
    last = _LADDER[-1]
    return Gallery(_encoded(comparison, folder, last, budget, partly=True) or {}, last.note)


def _encoded(
    comparison: Comparison, folder: Path, encoding: Encoding, budget: int, *, partly: bool
) -> dict[tuple[int, int], Picture] | None:
    """All pictures, or None when they exceed the budget; with `partly` those beyond it are left out."""
    pictures: dict[tuple[int, int], Picture] = {}
    used = 0
    for place in _places(comparison):
        picture = _picture(comparison, folder, place, encoding)
        used += picture.size
        if used > budget:
            if not partly:
                return None
            picture = Picture(problem="left out to keep this file small")
        pictures[place] = picture
    return pictures


def _places(comparison: Comparison) -> list[tuple[int, int]]:
    """(row, image) of every image, all rows of the first image first."""
    counts = [len(row.images) for row in comparison.rows]
    pairs = itertools.product(range(max(counts, default=0)), range(len(counts)))
    return [(row, image) for image, row in pairs if image < counts[row]]


def _picture(comparison: Comparison, folder: Path, place: tuple[int, int], encoding: Encoding) -> Picture:
    row, image = place
    path = folder / comparison.rows[row].images[image]
    pixels = _load(path)
    if pixels is None:
        return Picture(problem="file missing or damaged")
    uri = _uri(path, pixels, encoding)
    baseline = comparison.baseline
    if baseline is None or baseline is comparison.rows[row] or image >= len(baseline.images):
        return Picture(uri)
    reference = _load(folder / baseline.images[image])
    if reference is None or reference.size != pixels.size:
        return Picture(uri)
    error = heat.mean_squared_error(pixels, reference)
    return Picture(uri, _heat_uri(pixels, reference, encoding) if error else None, heat.psnr(error))


def _load(path: Path) -> Image.Image | None:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _uri(path: Path, pixels: Image.Image, encoding: Encoding) -> str:
    if encoding.quality is not None:
        return _as_webp(_fitted(pixels, encoding.side), encoding.quality)
    with Image.open(path) as image:
        kind = _BROWSER_FORMATS.get(image.format or "")
    return _as_uri(kind, path.read_bytes()) if kind else _as_png(pixels)


def _heat_uri(pixels: Image.Image, reference: Image.Image, encoding: Encoding) -> str:
    found = heat.heat_map(pixels, reference)
    if encoding.quality is None and max(found.size) <= _HEAT_SIDE:
        return _as_png(found)
    side = min(_HEAT_SIDE, encoding.side or _HEAT_SIDE)
    return _as_webp(_fitted(found.convert("RGB"), side), min(80, encoding.quality or 80))


def _fitted(image: Image.Image, side: int | None) -> Image.Image:
    if side is None or max(image.size) <= side:
        return image
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


def _as_png(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return _as_uri("image/png", buffer.getvalue())


def _as_webp(image: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return _as_uri("image/webp", buffer.getvalue())


def _as_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
