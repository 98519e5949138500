"""The header of a GGUF file: what it says about itself, and where its tensors are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any

from hasten.formats.format import BadFile
from hasten.formats.gguf.metadata import Cursor
from hasten.formats.gguf.types import BY_ID, PLAIN

MAGIC = b"GGUF"
ALIGNMENT = 32
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""Key of the true shape of a tensor that is stored in another, as ComfyUI-GGUF writes it."""
MOST_TENSORS = 1 << 17
MOST_DIMENSIONS = 8


@dataclass(frozen=True)
class Info:
    """A tensor of a file."""

    name: str
    type_id: int
    stored: tuple[int, ...]
    """Its shape in the file, outermost first."""
    shape: tuple[int, ...]
    """Its true shape."""
    start: int
    """Where it begins in the file."""
    size: int
    """Bytes."""

    @property
    def type_name(self) -> str:
        """Its type."""
        return BY_ID[self.type_id].name if self.type_id in BY_ID else PLAIN[self.type_id][0]


@dataclass(frozen=True)
class Header:
    """All that stands before the data."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, Info]


def read_header(data: mmap | bytes, path: Path) -> Header:
    """Read and check a header; raises BadFile."""
    cursor = Cursor(data, path)
    if data[: cursor.take(4, "the magic number") + 4] != MAGIC:
        raise BadFile(f"{path} is no GGUF file: it begins with {bytes(data[:4])!r} instead of {MAGIC!r}.")
    version = _version(cursor)
    count, pairs = cursor.number("Q", "the number of tensors"), cursor.number("Q", "the number of keys")
    if count > MOST_TENSORS:
        raise BadFile(f"{path} says that it holds {count} tensors; more than {MOST_TENSORS} are not read.")
    metadata = cursor.pairs(pairs)
    found = [_tensor(cursor, index, count) for index in range(count)]
    align = _alignment(metadata, path)
    start = -(-cursor.at // align) * align
    tensors: dict[str, Info] = {}
    for name, dimensions, kind, offset in found:
        if name in tensors:
            raise BadFile(f"{path}: the tensor {name[:80]!r} occurs twice.")
        if offset % align:
            raise BadFile(f"{path}: the tensor {name!r} begins at {offset}, which is no multiple of {align}.")
        stored = tuple(reversed(dimensions))
        shape = _true_shape(name, stored, metadata, path)
        tensors[name] = Info(name, kind, stored, shape, start + offset, _size(name, kind, stored, path))
    _within(tensors, len(data), path)
    return Header(version, metadata, tensors)


def _version(cursor: Cursor) -> int:
    version = cursor.number("I", "the version")
    if version & 0xFFFF == 0 and version:
        raise BadFile(f"{cursor.path} was written for big-endian machines, which hasten does not read.")
    if version not in (2, 3):
        raise BadFile(f"{cursor.path} is of version {version} of GGUF; hasten reads 2 and 3.")
    return version


def _tensor(cursor: Cursor, index: int, count: int) -> tuple[str, list[int], int, int]:
    what = f"tensor {index + 1} of {count}"
    name = cursor.text(f"the name of {what}")
    length = cursor.number("I", what)
    if length > MOST_DIMENSIONS:
        raise BadFile(f"{cursor.path}: the tensor {name[:80]!r} has {length} dimensions.")
    dimensions = [cursor.number("Q", what) for _ in range(length)]
    return name, dimensions, cursor.number("I", what), cursor.number("Q", what)


def _alignment(metadata: dict[str, Any], path: Path) -> int:
    align = metadata.get("general.alignment", ALIGNMENT)
    if type(align) is not int or not 0 < align <= 1 << 20 or align & align - 1:
        raise BadFile(f"{path}: an alignment of {str(align)[:40]} is no power of two up to {1 << 20}.")
    return align


def _true_shape(name: str, stored: tuple[int, ...], metadata: dict[str, Any], path: Path) -> tuple[int, ...]:
    given = metadata.get(ORIGINAL_SHAPE + name)
    if given is None:
        return stored
    if not isinstance(given, list) or len(given) > MOST_DIMENSIONS:  # pyright: ignore
        raise BadFile(f"{path}: the original shape of {name!r} is no list of a few numbers.")
    shape = tuple(given)  # pyright: ignore
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) != math.prod(stored):  # pyright: ignore
        raise BadFile(f"{path}: {name!r} is stored as {list(stored)}, which its original shape {given} does not hold.")
    return shape  # pyright: ignore


def _size(name: str, kind: int, stored: tuple[int, ...], path: Path) -> int:
    if kind in PLAIN:
        return math.prod(stored) * PLAIN[kind][1].itemsize
    if kind not in BY_ID:
        raise BadFile(f"{path}: the tensor {name!r} is of type {kind}, which is unknown or was withdrawn from GGUF.")
    found = BY_ID[kind]
    if not stored or stored[-1] % found.block:
        raise BadFile(
            f"{path}: rows of {name!r} are {list(stored[-1:])} long, and {found.name} has blocks of {found.block}."
        )
    return math.prod(stored) // found.block * found.size


def _within(tensors: dict[str, Info], length: int, path: Path) -> None:
    """Tensors must lie in the file, and apart from each other."""
    last: Info | None = None
    for info in sorted((info for info in tensors.values() if info.size), key=lambda info: info.start):
        if info.start + info.size > length:
            raise BadFile(f"{path} ends at {length}, and {info.name!r} at {info.start + info.size}: it is cut off.")
        if last is not None and info.start < last.start + last.size:
            raise BadFile(f"{path}: the tensors {last.name!r} and {info.name!r} overlap.")
        last = info
