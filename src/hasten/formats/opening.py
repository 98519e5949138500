"""Opens a file of any format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from hasten.core.errors import UnknownName
from hasten.formats.format import BadFile, Format, Reader
from hasten.formats.registry import formats


@dataclass(frozen=True)
class Opened:
    """An open file with its format."""

    format: Format
    reader: Reader

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()


def format_named(name: str) -> Format:
    """A format by name; raises UnknownName, which names the nearest."""
    if name not in formats():
        raise UnknownName("format", name, formats())
    return formats()[name]


def open_file(path: Path) -> Opened:
    """Open a file, or a folder of shards, as the first format that recognizes it. Raises BadFile if none does."""
    if not path.exists():
        raise BadFile(f"There is no file {path}.")
    for item in formats().values():
        if item.recognizes(path):
            return Opened(item, item.open(path))
    raise BadFile(f"{path} is of no format that hasten reads: {', '.join(formats())}.")
