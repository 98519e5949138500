"""A sheet of pictures, a method a row, from what `run.py` or `parallel.py` left under --from: for docs/caching.md.

python benchmarks/caching/sheet.py --from FOLDER --model emoji-flux --steps 28 --fraction 3 --out sheet.png "FORA" ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw
from references import read_pictures
from run import slug
from torch import Tensor

COLUMNS, MARGIN, SIDE = 7, 170, 128


def pictures(folder: Path, name: str) -> Tensor:
    """The pictures stored under a name, wherever below the folder."""
    found = next(iter(sorted(folder.rglob(f"{name}.npz"))), None)
    images = None if found is None else read_pictures(found)
    if images is None:
        raise SystemExit(f"There are no pictures called {name} below {folder}.")
    return images


def sheet(rows: list[tuple[str, Tensor]]) -> Image.Image:
    """One labelled row of pictures a method."""
    canvas = Image.new("RGB", (MARGIN + COLUMNS * SIDE, len(rows) * SIDE), "white")
    draw = ImageDraw.Draw(canvas)
    for y, (label, images) in enumerate(rows):
        draw.multiline_text((8, y * SIDE + 40), label.replace(", ", "\n"), fill="black", font_size=15)
        for x, image in enumerate(images[:COLUMNS]):
            pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
            canvas.paste(Image.fromarray(pixels), (MARGIN + x * SIDE, y * SIDE))
    return canvas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", help="names of rows as in results/*.json")
    parser.add_argument("--from", dest="source", type=Path, required=True)
    parser.add_argument("--model", default="emoji-flux")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--fraction", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("sheet.png"))
    options = parser.parse_args()
    folder = options.source
    shards = sorted(folder.glob(f"shards/{options.model}-{options.steps}-*"))
    places = shards or [folder]
    rows = [(f"plain, {options.steps} steps", pictures(places[0], f"plain-{options.steps}"))]
    for method in options.methods:
        name = slug(f"{method} @ 1/{options.fraction}")
        place = next((p for p in places if any(p.rglob(f"{name}.npz"))), places[0])
        rows.append((method, pictures(place, name)))
    sheet(rows).quantize(160).save(options.out, optimize=True)


if __name__ == "__main__":
    main()
