"""What the numbers mean: how close each row stays, which one to take, and what to distrust."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hasten.measure.comparison import Comparison, FidelityRecord, Row
from hasten.measure.quality import SCALE

Closeness = Literal["identical", "none", "invisible", "slight", "visible", "strong", "unknown"]

ORDER: tuple[Closeness, ...] = ("identical", "none", "invisible", "slight", "visible", "strong", "unknown")

WORDS: dict[Closeness, str] = {
    "identical": "identical",
    "none": "none (below the noise floor)",
    "invisible": "invisible",
    "slight": "slight",
    "visible": "visible",
    "strong": "strong",
    "unknown": "not measured",
}


def closeness(row: Row) -> Closeness:
    """How far the images of `row` are from the plain ones, as recorded or else judged from its measures."""
    if row.fidelity is None:
        return "unknown"
    if row.fidelity.identical:
        return "identical"
    return _known(row.difference) or _judged(row.fidelity, row.noise_floor)


def _known(word: str | None) -> Closeness | None:
    return next((known for known in ORDER if known == word), None)


def _judged(found: FidelityRecord, floor: FidelityRecord | None) -> Closeness:
    lpips = found.lpips or 0.0
    if floor and found.decibels >= floor.decibels and (floor.lpips is None or lpips <= floor.lpips):
        return "none"
    for word, least_psnr, most_lpips in SCALE:
        if found.decibels >= least_psnr and lpips <= most_lpips:
            return _known(word) or "unknown"
    return "strong"


def difference_text(row: Row) -> str:
    """The word of `closeness`, or what was recorded in its place; empty for the baseline."""
    if row.fidelity is None:
        return ""
    word = closeness(row)
    return row.difference if row.difference and row.difference not in ORDER else WORDS[word]


def noise_floor(comparison: Comparison) -> FidelityRecord | None:
    """The noise floor of the comparison: the first one any row holds."""
    return next((row.noise_floor for row in comparison.rows if row.noise_floor), None)


def has_run(row: Row) -> bool:
    """True for a row whose figures count: a failed one may hold some, but of something that did not work."""
    return row.status in ("ok", "interrupted")


def measured(comparison: Comparison) -> list[Row]:
    """The rows other than the baseline that have both a speed-up and a fidelity, fastest first."""
    rows = (row for row in comparison.rows if row.kind != "baseline" and has_run(row))
    found = [row for row in rows if row.speedup and row.fidelity]
    return sorted(found, key=lambda row: -(row.speedup or 0))


def controls(comparison: Comparison) -> list[Row]:
    """What every recipe must beat: fewer steps, or another solver, without any technique; fastest first."""
    return [row for row in measured(comparison) if row.kind in ("fewer_steps", "other_solver")]


def is_faster(row: Row, baseline: Row | None) -> bool:
    """True when the row is faster by more than the spread of the timings."""
    if row.speedup is None or row.speedup <= 1:
        return False
    return not (
        baseline
        and baseline.seconds_per_image
        and row.seconds_per_image
        and row.seconds_per_image.overlaps(baseline.seconds_per_image)
    )


@dataclass(frozen=True)
class Choice:
    """The fastest recipe among those that stay as close as `limit`."""

    limit: Closeness
    row: Row


def fastest_within(comparison: Comparison, limit: Closeness) -> Row | None:
    """The fastest finished recipe whose images differ no more than `limit`; controls are left out."""
    allowed = ORDER[: ORDER.index(limit) + 1]
    rows = (row for row in measured(comparison) if row.kind == "recipe" and row.status == "ok")
    return next((r for r in rows if closeness(r) in allowed and is_faster(r, comparison.baseline)), None)


def choices(comparison: Comparison) -> list[Choice]:
    """The rows worth a sentence, strictest first; a laxer limit appears only where it is faster."""
    found: list[Choice] = []
    for limit in ("identical", "invisible", "slight", "strong"):
        row = fastest_within(comparison, limit)
        if row and row not in [choice.row for choice in found]:
            found.append(Choice(limit, row))
    return found


def pick(comparison: Comparison) -> Choice | None:
    """The row to point at: the fastest with a slight difference at most, otherwise the fastest of all.

    Rows that a control beats come into question only where it beats all of those.
    """
    found = choices(comparison)
    close = [choice for choice in found if choice.limit != "strong"]
    worth = [choice for choice in close if not beaten_by(choice.row, comparison)]
    return (worth or close or found or [None])[-1]


def nearest_control(comparison: Comparison) -> Row | None:
    """The control whose speed is nearest to that of the row pointed at, or else the fastest one."""
    choice, found = pick(comparison), controls(comparison)
    if choice is None:
        return found[0] if found else None
    aim = choice.row.speedup or 1.0
    return min(found, key=lambda row: abs((row.speedup or 1.0) - aim), default=None)


def beaten_by(row: Row, comparison: Comparison) -> Row | None:
    """A control (fewer steps, another solver) that is at least as fast and as close as `row`."""
    if row.fidelity is None or row.speedup is None:
        return None
    for other in controls(comparison):
        if other.fidelity and other.speedup:
            closer = other.fidelity.decibels >= row.fidelity.decibels
            if closer and other.speedup >= row.speedup:
                return other
    return None
