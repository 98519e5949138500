"""The folder of a report: what an earlier comparison left there must not be taken for part of the new one."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from hasten.core.errors import HastenError
from hasten.measure.comparison import Comparison


def pictures_in(folder: Path) -> set[Path]:
    """The pictures that the `comparison.json` in `folder` lists; none where there is no readable one."""
    try:
        found = Comparison.load(folder / "comparison.json")
    except HastenError:
        return set()
    return {folder / image for row in found.rows for image in row.images}


def remove_pictures(pictures: set[Path]) -> None:
    """Delete pictures, and the row folders that are empty then; what cannot be deleted stays."""
    for picture in pictures:
        with suppress(OSError):
            picture.unlink(missing_ok=True)
    for folder in {picture.parent for picture in pictures}:
        with suppress(OSError):
            folder.rmdir()
