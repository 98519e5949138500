"""Layout of the speed-versus-fidelity chart: axes, points, and labels that do not overlap.

Speed-up runs to the right, PSNR upwards; identical images (infinite PSNR) get a band of their own on top.
All coordinates are SVG user units, y downwards.
"""

from __future__ import annotations

import itertools
import math
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass

from hasten.measure.comparison import Comparison, Kind, Row
from hasten.measure.report import formatting as fmt
from hasten.measure.report.names import labels, readable
from hasten.measure.report.verdict import has_run, noise_floor

RADIUS = 6.0
FONT = 12.5
LINE = 16.0
_FAR = 15.0
_BAND = 44.0
_LEFT, _RIGHT = 54.0, 30.0  # room for the label of a point at either end
_LONGEST = 28


@dataclass(frozen=True)
class Box:
    """A rectangle from its left upper corner."""

    x: float
    y: float
    width: float
    height: float

    def overlaps(self, other: Box) -> bool:
        """True when the two share any area."""
        apart_x = self.x + self.width <= other.x or other.x + other.width <= self.x
        apart_y = self.y + self.height <= other.y or other.y + other.height <= self.y
        return not (apart_x or apart_y)

    def distance(self, place: tuple[float, float]) -> float:
        """How far a place is from the nearest side; 0 inside."""
        across = max(self.x - place[0], 0.0, place[0] - self.x - self.width)
        return math.hypot(across, max(self.y - place[1], 0.0, place[1] - self.y - self.height))

    def inside(self, other: Box) -> bool:
        """True when `other` holds all of this box."""
        across = other.x <= self.x and self.x + self.width <= other.x + other.width
        return across and other.y <= self.y and self.y + self.height <= other.y + other.height


@dataclass(frozen=True)
class Label:
    """Text in its box; `leader` is set when it stands so far from its point that a line must join them."""

    text: str
    box: Box
    leader: bool

    def anchor(self, place: tuple[float, float]) -> tuple[float, float]:
        """Where the line from a point ends: at half the height of the side or end nearest to it."""
        return min(max(place[0], self.box.x), self.box.x + self.box.width), self.box.y + self.box.height / 2


@dataclass(frozen=True)
class Point:
    """One row of the comparison; `label` is None only where no free place was left."""

    row: int
    kind: Kind
    x: float
    y: float
    title: str
    label: Label | None


@dataclass(frozen=True)
class Tick:
    """A grid line at `at`, with its number."""

    at: float
    text: str


@dataclass(frozen=True)
class Chart:
    """Everything the drawing needs; `floor` is the height of the noise floor's line."""

    width: float
    height: float
    plot: Box
    band: float
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: list[Point]
    frontier: list[tuple[float, float]]
    floor: Tick | None
    left_out: list[str]


@dataclass(frozen=True)
class _Scale:
    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)


def lay_out(comparison: Comparison, width: float = 680, height: float = 630) -> Chart | None:
    """Place every measured row and its label; None when fewer than two rows can be shown."""
    shown = [(index, row) for index, row in enumerate(comparison.rows) if _is_shown(row)]
    if len(shown) < 2:
        return None
    plot = Box(48, 12, width - 48 - 14, height - 12 - 46)
    across, up = _scales(comparison, [row for _, row in shown], plot)
    places = [_place(row, across, up, plot) for _, row in shown]
    floor = _floor(comparison, up)
    frontier = _frontier(places)
    placed = place_labels(labels([row for _, row in shown]), places, plot, _reserved(floor, plot), _along(frontier))
    points = [
        Point(index, row.kind, x, y, _title(row), label)
        for (index, row), (x, y), label in zip(shown, places, placed, strict=True)
    ]
    return Chart(
        width=width,
        height=height,
        plot=plot,
        band=plot.y + _BAND,
        x_ticks=[Tick(across(v), f"{v:g}\N{MULTIPLICATION SIGN}") for v in ticks(max(0.0, across.low), across.high, 6)],
        y_ticks=[tick for tick in _decibel_ticks(up) if tick.at > plot.y + _BAND + LINE],
        points=points,
        frontier=frontier,
        floor=floor,
        left_out=[readable(row.name) for row in comparison.rows if not _is_shown(row)],
    )


def _is_shown(row: Row) -> bool:
    return has_run(row) and row.speedup is not None and (row.kind == "baseline" or row.fidelity is not None)


def _decibels(row: Row) -> float:
    return math.inf if row.fidelity is None else row.fidelity.decibels


def _scales(comparison: Comparison, rows: list[Row], plot: Box) -> tuple[_Scale, _Scale]:
    speeds = [row.speedup or 1.0 for row in rows]
    per_unit = (plot.width - _LEFT - _RIGHT) / max(max(speeds) - min(speeds), 0.5)
    low = min(speeds) - _LEFT / per_unit
    across = _Scale(low, low + plot.width / per_unit, plot.x, plot.x + plot.width)
    floor = noise_floor(comparison)
    finite = [level for level in map(_decibels, rows) if math.isfinite(level)] or [20.0, 50.0]
    finite += [min(floor.decibels, max(finite) + _FAR)] if floor else []  # a floor far above leaves rows their room
    low, high = 5 * math.floor((min(finite) - 2) / 5), 5 * math.ceil((max(finite) + 1) / 5)
    return across, _Scale(low, high, plot.y + plot.height, plot.y + _BAND)


def _place(row: Row, across: _Scale, up: _Scale, plot: Box) -> tuple[float, float]:
    level = _decibels(row)
    return across(row.speedup or 1.0), up(level) if math.isfinite(level) else plot.y + _BAND / 2


def _floor(comparison: Comparison, up: _Scale) -> Tick | None:
    floor = noise_floor(comparison)
    if floor is None or floor.psnr is None:
        return None
    beyond = " (off the scale)" if floor.psnr > up.high else ""
    return Tick(up(min(floor.psnr, up.high)), f"noise floor {fmt.psnr(floor)} dB{beyond}")


def _decibel_ticks(up: _Scale) -> list[Tick]:
    return [Tick(up(value), f"{value:g}") for value in ticks(up.low, up.high, 6)]


def _reserved(floor: Tick | None, plot: Box) -> list[Box]:
    """The box of the noise floor's own label, at the right end of its line."""
    width = text_width(floor.text) + 8 if floor else 0
    return [Box(plot.x + plot.width - width, floor.at - LINE, width, LINE)] if floor else []


def _along(line: list[tuple[float, float]]) -> list[Box]:
    """Small boxes along a line, which labels avoid where they can."""
    boxes: list[Box] = []
    for (x, y), (to_x, to_y) in itertools.pairwise(line):
        pieces = max(1, round(math.hypot(to_x - x, to_y - y) / 5))
        places = [index / pieces for index in range(pieces + 1)]
        boxes += [Box(x + (to_x - x) * t - 2, y + (to_y - y) * t - 2, 4, 4) for t in places]
    return boxes


def _title(row: Row) -> str:
    level = "identical images" if math.isinf(_decibels(row)) else f"PSNR {fmt.psnr(row.fidelity)} dB"
    return f"{readable(row.name)}: {fmt.speedup(row.speedup)}, {'plain pipeline' if row.kind == 'baseline' else level}"


def _frontier(places: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The places that no other place beats both to the right and upwards, from left to right."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(places, key=lambda place: (-place[0], place[1])):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best[::-1]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most `most` of them and at least two."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 10) for index in range(first, last + 1)]


def text_width(text: str) -> float:
    """A cautious estimate in user units: no common system font is wider."""
    return FONT * sum(_character_width(character) for character in text)


def _character_width(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 1.15
    if character in " .,:;'|!()[]ijlft-":
        return 0.4
    return 0.95 if character in "mwMW@%" else 0.72 if character.isupper() else 0.63


def shortened(text: str) -> str:
    """The text, cut in the middle where it is longer than a label may be."""
    text = fmt.one_line(text)
    half = (_LONGEST - 1) // 2
    return text if len(text) <= _LONGEST else f"{text[:half].rstrip()}\N{HORIZONTAL ELLIPSIS}{text[-half:].lstrip()}"


def place_labels(
    names: list[str],
    places: list[tuple[float, float]],
    plot: Box,
    reserved: list[Box],
    avoided: list[Box],
) -> list[Label | None]:
    """Give each name the free place nearest to its point, off `avoided` if possible; None where there is none."""
    taken = reserved + [Box(x - RADIUS - 1, y - RADIUS - 1, 2 * RADIUS + 2, 2 * RADIUS + 2) for x, y in places]
    placed: list[Label | None] = []
    for name, place in zip(names, places, strict=True):
        free = [
            label
            for label in _candidates(shortened(name), place)
            if label.box.inside(plot) and not any(label.box.overlaps(other) for other in taken)
        ]
        found = min(free, key=lambda label: _unease(label, place, places, avoided), default=None)
        placed.append(found)
        if found:
            taken.append(found.box)
    return placed


def _unease(label: Label, place: tuple[float, float], places: list[tuple[float, float]], avoided: list[Box]) -> int:
    """0 for a label close to its own point and to no other, more for one that is harder to read."""
    others = [other for other in places if other != place]
    if label.leader:
        return 2 + 2 * any(_gap(place, label.anchor(place), other) < RADIUS + 1 for other in others)
    own = label.box.distance(place)
    strayed = any(label.box.distance(other) < own + 4 for other in others)
    crossed = any(label.box.overlaps(other) for other in avoided)
    return 3 * strayed + crossed


def _gap(start: tuple[float, float], end: tuple[float, float], place: tuple[float, float]) -> float:
    """Distance of a place from the line between two others."""
    dx, dy = end[0] - start[0], end[1] - start[1]
    along = ((place[0] - start[0]) * dx + (place[1] - start[1]) * dy) / ((dx * dx + dy * dy) or 1.0)
    nearest = min(1.0, max(0.0, along))
    return math.hypot(start[0] + nearest * dx - place[0], start[1] + nearest * dy - place[1])


def _candidates(text: str, place: tuple[float, float]) -> Iterator[Label]:
    """Places around a point: right, left, above, below, then further out in rings."""
    (x, y), width, gap = place, text_width(text), RADIUS + 3
    for left, top in (
        (gap, -LINE / 2),
        (-gap - width, -LINE / 2),
        (-width / 2, -gap - LINE),
        (-width / 2, gap),
    ):
        yield Label(text, Box(x + left, y + top, width, LINE), leader=False)
    for distance, turn in itertools.product(range(14, 150, 6), range(16)):
        angle = math.pi * ((turn + 1) // 2) / 8 * (-1) ** turn
        left = x + distance * math.cos(angle) - (width if math.cos(angle) < -0.1 else 0)
        box = Box(left, y + distance * math.sin(angle) - LINE / 2, width, LINE)
        yield Label(text, box, leader=distance > 20)
