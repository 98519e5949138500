"""Reading and writing of the numbers, texts and lists of a GGUF header, with bounds on everything."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any, cast

from hasten.formats.format import BadFile

Value = Any
"""A number, a bool, a text, or a list of such."""

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values by their number, as `struct` knows them; all are little-endian."""
TEXT, LIST = 8, 9
_CODES = {code: number for number, code in NUMBERS.items()}

MOST_BYTES = 1 << 27
"""Of a header. Vocabularies take a few megabytes."""
MOST_ENTRIES = 1 << 21
"""Of all lists and keys of a header together."""
DEEPEST = 4
"""Lists in lists."""


class Cursor:
    """Reads a header from its beginning; never beyond the file, and never more than the bounds above."""

    def __init__(self, data: mmap | bytes, path: Path) -> None:
        self.data, self.path, self.at, self.entries = data, path, 0, 0

    def take(self, count: int, what: str) -> int:
        """Step over so many bytes; where they begin."""
        start = self.at
        if count > min(len(self.data), MOST_BYTES) - start:
            where = "the end of the file" if len(self.data) <= MOST_BYTES else f"the first {MOST_BYTES >> 20} MiB"
            raise BadFile(f"{self.path}: {what} reaches beyond {where}.")
        self.at += count
        return start

    def number(self, code: str, what: str) -> int:
        """A number of a type of `struct`."""
        size = struct.calcsize(code)
        return struct.unpack_from("<" + code, self.data, self.take(size, what))[0]

    def text(self, what: str) -> str:
        """A length and so many bytes of UTF-8."""
        size = self.number("Q", what)
        start = self.take(size, what)
        try:
            return self.data[start : start + size].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadFile(f"{self.path}: {what} is not UTF-8 text.") from error

    def count(self, more: int, what: str) -> None:
        """Note so many entries that will be kept."""
        self.entries += more
        if self.entries > MOST_ENTRIES:
            raise BadFile(f"{self.path}: {what} has {more} entries; more than {MOST_ENTRIES} are not read.")

    def value(self, kind: int, what: str, depth: int = 0) -> Value:
        """A value of a type by number."""
        if kind in NUMBERS:
            return self.number(NUMBERS[kind], what)
        if kind == TEXT:
            return self.text(what)
        if kind != LIST:
            raise BadFile(f"{self.path}: {what} is of the unknown type {kind}.")
        if depth == DEEPEST:
            raise BadFile(f"{self.path}: {what} holds lists in lists more than {DEEPEST} deep.")
        return self._list(what, depth)

    def _list(self, what: str, depth: int) -> list[Value]:
        kind, length = self.number("I", what), self.number("Q", what)
        self.count(length, what)
        if kind in NUMBERS:
            form = f"<{length}{NUMBERS[kind]}"
            return list(struct.unpack_from(form, self.data, self.take(struct.calcsize(form), what)))
        return [self.value(kind, what, depth + 1) for _ in range(length)]

    def pairs(self, length: int) -> dict[str, Value]:
        """So many keys with values."""
        self.count(length, "the metadata")
        found: dict[str, Value] = {}
        for index in range(length):
            key = self.text(f"key {index + 1} of {length}")
            if key in found:
                raise BadFile(f"{self.path}: the key {key[:80]!r} occurs twice.")
            found[key] = self.value(self.number("I", f"the type of {key[:80]!r}"), f"the value of {key[:80]!r}")
        return found


def written_text(text: str) -> bytes:
    """A text with its length."""
    data = text.encode("utf-8", errors="replace")
    return struct.pack("<Q", len(data)) + data


def written_pairs(metadata: Mapping[str, Value]) -> bytes:
    """Keys and values; lists are of one type, whole numbers of 32 bits where they fit."""
    return b"".join(
        written_text(key) + struct.pack("<I", (kind := _kind([value]))) + _written(value, kind)
        for key, value in metadata.items()
    )


def storable(value: Value) -> bool:
    """Can a value stand in a header?"""
    try:
        _written(value, _kind([value]))
    except (TypeError, struct.error, OverflowError):
        return False
    return True


def _kind(values: Sequence[Value]) -> int:
    """The number of the type that holds all values."""
    types = {type(value) for value in values}
    if types == {bool}:
        return _CODES["?"]
    if types == {str}:
        return TEXT
    if types in ({list}, {tuple}):
        return LIST
    if types == {int}:
        return _whole(min(values), max(values))
    if types and types <= {int, float}:
        return _CODES["f" if all(_single(float(value)) for value in values) else "d"]
    if not types:
        return _CODES["i"]
    raise TypeError(f"values of types {sorted(item.__name__ for item in types)} cannot stand in a GGUF header.")


def _whole(least: int, greatest: int) -> int:
    if least >= -(1 << 31) and greatest < 1 << 31:
        return _CODES["i" if least < 0 else "I"]
    if least >= 0:
        return _CODES["I" if greatest < 1 << 32 else "Q"]
    return _CODES["q"]


def _single(value: float) -> bool:
    if value != value or abs(value) == float("inf"):
        return True
    return abs(value) < 3.4e38 and struct.unpack("<f", struct.pack("<f", value))[0] == value


def _written(value: Value, kind: int) -> bytes:
    if kind == TEXT:
        return written_text(value)
    if kind != LIST:
        return struct.pack("<" + NUMBERS[kind], value)
    items = cast("Sequence[Value]", value)
    inner = _kind(items)
    # What reads the shapes and vocabularies of others wants whole numbers of lists with a sign.
    inner = _CODES["i"] if inner == _CODES["I"] and max(items) < 1 << 31 else inner
    return struct.pack("<IQ", inner, len(items)) + b"".join(_written(item, inner) for item in items)
