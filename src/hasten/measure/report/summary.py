"""The summary of a report: a headline, a few plain sentences and the key figures, computed from the rows."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from hasten.measure.comparison import Comparison, Row
from hasten.measure.report import formatting as fmt
from hasten.measure.report.names import readable
from hasten.measure.report.verdict import (
    Choice,
    beaten_by,
    choices,
    closeness,
    is_faster,
    measured,
    nearest_control,
    noise_floor,
    pick,
)

_TIMES = "\N{MULTIPLICATION SIGN}"

_OPENINGS = {
    "identical": "Fastest row with exactly the same pixels: {b} at {}.",
    "invisible": "Fastest row that still looks the same: {b} at {} ({}).",
    "slight": "Where slight differences are fine: {b} at {} ({}).",
    "strong": "Fastest of all: {b} at {}, but its images plainly differ ({}).",
}
_TILE_LABELS = {
    "identical": "Same pixels",
    "invisible": "Looks the same",
    "slight": "Slight differences",
    "strong": "Plainly different",
}
_HEADLINES = {
    "identical": "every pixel the same",
    "none": "and the images look the same",
    "invisible": "and the images look the same",
    "slight": "with slight differences",
}
_CONTROLS = {"fewer_steps": "fewer steps", "other_solver": "another solver"}
_VERDICTS = {
    (True, True): "{b} is both faster and closer.",
    (True, False): "{b} is slower but closer.",
    (False, True): "{b} is faster but further away.",
    (False, False): "{b} does not beat it.",
}


@dataclass(frozen=True)
class Part:
    """A piece of a sentence, plain text; `strong` where it names a row."""

    text: str
    strong: bool = False


Sentence = tuple[Part, ...]


@dataclass(frozen=True)
class Tile:
    """One figure at the top of the report; `row` is the row it belongs to."""

    label: str
    value: str
    name: str
    measure: str
    row: int
    kind: str


def plain_text(sentence: Sentence) -> str:
    """The sentence without emphasis."""
    return "".join(part.text for part in sentence)


def headline(comparison: Comparison) -> str:
    """The outcome in a few words."""
    choice = pick(comparison)
    if choice is None:
        if measured(comparison):
            return "No recipe was faster"
        alone = all(row.kind == "baseline" for row in comparison.rows)
        return "Only the plain pipeline was run" if alone else "No recipe could be compared"
    likeness = _HEADLINES.get(closeness(choice.row), "but the images differ")
    gain = f"{fmt.speedup(choice.row.speedup, _TIMES)} as fast, {likeness}"
    better = beaten_by(choice.row, comparison)
    return f"{gain}; {_CONTROLS[better.kind]} would do" if better else gain


def sentences(comparison: Comparison) -> list[Sentence]:
    """The summary paragraph: what was gained, and how it stands against fewer steps."""
    found = [*_plain(comparison), *map(_choice, choices(comparison))]
    if measured(comparison) and not choices(comparison):
        found.append(_say("No recipe was faster than the plain pipeline by more than the spread of the timings."))
    return [*found, *_controls(comparison)]


def cautions(comparison: Comparison) -> list[Sentence]:
    """What to bear in mind: unclear timings, rows that are missing, and the noise floor."""
    return [*_warnings(comparison), *_floor(comparison)]


def _say(pattern: str, *values: str) -> Sentence:
    """Fill `{}` and, for emphasis, `{b}` with the values in order."""
    pieces = re.split(r"(\{b?\})", pattern)
    filled = iter(values)
    parts = (Part(next(filled), piece == "{b}") if piece in ("{}", "{b}") else Part(piece) for piece in pieces)
    return tuple(part for part in parts if part.text)


def _plain(comparison: Comparison) -> Iterator[Sentence]:
    work, row = comparison.workload, comparison.baseline
    size = f"{work.width} {_TIMES} {work.height} in {fmt.plural(work.steps, 'step')}"
    if row is None or row.seconds_per_image is None:
        text = "The plain pipeline ({b}, {}) was not measured, so nothing can be compared with it."
        yield _say(text, fmt.model_name(work.model), size)
        return
    text = "The plain pipeline, {b} at {}, takes {} s an image here ({} on {}; median over {}, {} each)."
    time = fmt.seconds(row.seconds_per_image.median)
    images = fmt.plural(len(work.prompts) * len(work.seeds), "image")
    where = (work.dtype, work.device, images, fmt.plural(work.runs, "run"))
    yield _say(text, fmt.model_name(work.model), size, time, *where)


def _choice(choice: Choice) -> Sentence:
    row = choice.row
    values = [readable(row.name), fmt.speedup(row.speedup, _TIMES), _measures(row)]
    return _say(_OPENINGS[str(choice.limit)], *values)


def _measures(row: Row) -> str:
    found = row.fidelity
    if found is None or found.psnr is None:
        return "identical"
    return f"PSNR {fmt.psnr(found)} dB"


def _controls(comparison: Comparison) -> Iterator[Sentence]:
    """How the recipes stand against what anyone gets for nothing: fewer steps, or another solver."""
    recipes = [row for row in measured(comparison) if row.kind == "recipe" and row.status == "ok"]
    beaten = [row for row in recipes if beaten_by(row, comparison)]
    if beaten:
        verb = "is" if len(beaten) == 1 else "are"
        text = "{b} {} not worth having here: the plain pipeline with {} is at least as fast and as close."
        other = beaten_by(beaten[0], comparison)
        yield _say(text, _names(beaten), verb, _CONTROLS[other.kind if other else "fewer_steps"])
    choice, control = pick(comparison), nearest_control(comparison)
    if choice and control and choice.row not in beaten:
        yield _against(choice.row, control)


def _against(row: Row, other: Row) -> Sentence:
    gains = _say(
        "For comparison, {b} reaches {} ({}): ",
        readable(other.name),
        fmt.speedup(other.speedup, _TIMES),
        _measures(other),
    )
    closer = bool(row.fidelity and other.fidelity and row.fidelity.decibels > other.fidelity.decibels)
    faster = (row.speedup or 0) >= (other.speedup or 0)
    return gains + _say(_VERDICTS[closer, faster], readable(row.name))


def _warnings(comparison: Comparison) -> Iterator[Sentence]:
    plain = comparison.baseline
    yield from (_say("{}", warning) for warning in comparison.warnings)
    slower = [row for row in measured(comparison) if row.kind == "recipe" and not is_faster(row, plain)]
    for row in slower:
        if (row.speedup or 0) > 1:
            yield _say("The gain of {b} lies within the spread of the timings and may be chance.", readable(row.name))
    for status in ("refused", "failed", "interrupted"):
        rows = [row for row in comparison.rows if row.status == status]
        if rows:
            verb = "" if status == "failed" else "was " if len(rows) == 1 else "were "
            yield _say("{b} {}.", _names(rows), verb + status)


def _floor(comparison: Comparison) -> Iterator[Sentence]:
    if not measured(comparison):
        return
    floor = noise_floor(comparison)
    if floor is None:
        yield _say("No noise floor was measured, so even the smallest difference counts as one.")
    elif floor.psnr is None:
        yield _say("The plain pipeline repeats itself exactly here, so every difference is a recipe's doing.")
    else:
        text = (
            "When only the order of its arithmetic changes, the plain pipeline differs from itself by {} dB "
            "(the noise floor); a difference smaller than that means nothing."
        )
        yield _say(text, fmt.psnr(floor))
    yield _say(
        "Words such as “looks the same” are judged from PSNR and LPIPS alone: look at the images before you trust them."
    )


def tiles(comparison: Comparison) -> list[Tile]:
    """The plain time, then the rows worth pointing at, then the fastest row with fewer steps."""
    rows = list(comparison.rows)
    found: list[Tile] = []
    plain = comparison.baseline
    if plain and plain.seconds_per_image:
        value = f"{fmt.seconds(plain.seconds_per_image.median)} s"
        found.append(Tile("Plain, per image", value, readable(plain.name), "", rows.index(plain), "baseline"))
    found += [_tile(_TILE_LABELS[str(c.limit)], c.row, rows, str(c.limit)) for c in choices(comparison)]
    control = nearest_control(comparison)
    label = "Just fewer steps" if control and control.kind == "fewer_steps" else "Just another solver"
    return [*found, _tile(label, control, rows, control.kind)] if control else found


def _tile(label: str, row: Row, rows: list[Row], kind: str) -> Tile:
    same = row.fidelity is not None and row.fidelity.identical
    measure = "identical" if same else f"{fmt.psnr(row.fidelity)} dB"
    return Tile(label, fmt.speedup(row.speedup, _TIMES), readable(row.name), measure, rows.index(row), kind)


def _names(rows: list[Row]) -> str:
    names = [readable(row.name) for row in rows]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
