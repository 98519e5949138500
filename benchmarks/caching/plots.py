"""The plots: PSNR to the plain pictures against full steps, and against seconds."""

from __future__ import annotations

from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

from bootstrap import estimate

from hasten.core.files import atomic_write_bytes

COLOURS = {
    "baseline": ("#111111", "#555555", "#888888", "#b0b0b0"),
    "peer": ("#c2410c", "#d97706", "#b91c1c", "#db2777", "#a16207", "#9333ea"),
    "ours": ("#1d4ed8", "#0891b2", "#15803d", "#4f46e5", "#0d9488"),
}
MARKERS = "osD^vP*Xhp<>"


def draw_all(tables: list[Any], folder: Path) -> None:
    """One picture a table."""
    for table in tables:
        atomic_write_bytes(folder / f"{table.slug}.webp", drawn(table))


def drawn(table: Any) -> bytes:
    """Both plots of a table as lossless WebP."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 5.2), sharey=True)
    for place, (name, rows) in enumerate(series(table).items()):
        colours = COLOURS[rows[0]["kind"]]
        style = {"color": colours[place % len(colours)], "marker": MARKERS[place % len(MARKERS)], "markersize": 5}
        dashes = ["-", "--", "-.", ":"][place % 4]
        estimates = [estimate(row["to_plain"]["psnr"]) for row in rows]
        means = [one.mean for one in estimates]
        bars = [[one.mean - one.low for one in estimates], [one.high - one.mean for one in estimates]]
        common = {"linewidth": 1.1, "linestyle": dashes, "elinewidth": 0.6, **style}
        axes[0].errorbar([row["full_steps"] for row in rows], means, yerr=bars, label=name, **common)
        axes[1].plot([relative_time(row) for row in rows], means, linewidth=1.1, linestyle=dashes, **style)
    label(table, axes)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7, frameon=False)
    figure.tight_layout(rect=(0, 0, 0.76, 1))
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=90, metadata={"Software": None})
    plt.close(figure)
    return fewer_colours(buffer)


LOSSLESS: dict[str, Any] = {"lossless": True, "quality": 100, "method": 6}


def fewer_colours(png: BytesIO) -> bytes:
    """The same picture with 96 colours: a quarter of the bytes."""
    from PIL import Image

    small = BytesIO()
    Image.open(png).convert("RGB").quantize(96, dither=Image.Dither.NONE).convert("RGB").save(small, "WEBP", **LOSSLESS)
    return small.getvalue()


def label(table: Any, axes: Any) -> None:
    """Axes in words."""
    axes[0].set(xlabel="full steps", ylabel="PSNR to the plain pictures (dB)", title=table.title)
    axes[1].set(xlabel="processor time / that of the plain pipeline", title="against time")
    for axis in axes:
        axis.grid(alpha=0.3, linewidth=0.5)


def relative_time(row: dict[str, Any]) -> float:
    """Seconds a picture over the plain pipeline's at that moment: the machine's drift cancels."""
    processor = row["cpu_seconds"]
    return processor["median"] / processor["plain_meanwhile"]


def series(table: Any) -> dict[str, list[dict[str, Any]]]:
    """Rows of each method that ran, by name, most full steps first."""
    found: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for key, row in table.content["rows"].items():
        if key != "plain" and row["status"] == "ok":
            found[row["name"]].append(row)
    order = ("baseline", "peer", "ours")
    return dict(sorted(found.items(), key=lambda item: order.index(item[1][0]["kind"])))
