"""Draw every ``logs/*.csv`` as one loss curve (log scale) into ``logs/curves.webp``; needs Pillow only."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from PIL import Image, ImageDraw

WIDTH, HEIGHT, MARGIN = 420, 240, 40


def read(path: Path) -> tuple[list[float], list[float]]:
    """Seconds and losses."""
    with path.open() as handle:
        rows = list(csv.DictReader(handle))
    return [float(row["seconds"]) for row in rows], [float(row["loss"]) for row in rows]


def panel(path: Path) -> Image.Image:
    """One curve with its range written at the axes."""
    seconds, losses = read(path)
    logs = [math.log(loss) for loss in losses]
    low, high, end = min(logs), max(logs), max(seconds)
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(picture)
    inner_x, inner_y = WIDTH - 2 * MARGIN, HEIGHT - 2 * MARGIN
    points = [
        (MARGIN + inner_x * s / end, MARGIN + inner_y * (high - v) / (high - low or 1.0))
        for s, v in zip(seconds, logs, strict=True)
    ]
    draw.rectangle((MARGIN, MARGIN, WIDTH - MARGIN, HEIGHT - MARGIN), outline="#bbbbbb")
    draw.line(points, fill="#1f5fbf", width=2)
    draw.text((MARGIN, 12), f"{path.stem}: loss (log scale) over seconds", fill="black")
    draw.text((4, MARGIN), f"{max(losses):.3f}", fill="black")
    draw.text((4, HEIGHT - MARGIN - 10), f"{min(losses):.3f}", fill="black")
    draw.text((WIDTH - MARGIN - 40, HEIGHT - MARGIN + 6), f"{end:.0f} s", fill="black")
    return picture


def main() -> None:
    """All logs in a column."""
    logs = Path(__file__).parent / "logs"
    panels = [panel(path) for path in sorted(logs.glob("*.csv"))]
    sheet = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    for i, picture in enumerate(panels):
        sheet.paste(picture, (0, HEIGHT * i))
    sheet.save(logs / "curves.webp", lossless=True, quality=100, method=6)


if __name__ == "__main__":
    main()
