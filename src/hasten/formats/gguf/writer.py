"""Writes GGUF files one tensor at a time."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hasten.core.errors import HastenError, UnknownName
from hasten.core.files import ensure_folder
from hasten.formats.format import Entry, Writer
from hasten.formats.gguf.header import ALIGNMENT, MAGIC, ORIGINAL_SHAPE
from hasten.formats.gguf.metadata import storable, written_pairs, written_text
from hasten.formats.gguf.types import PLAIN, type_of
from hasten.kernels.weight import QuantizedWeight

PLAIN_IDS = {dtype: number for number, (_, dtype) in PLAIN.items()}
GREATEST_RANK = 4
"""Dimensions that a tensor of ggml may have."""


class GGUFWriter(Writer):
    """A GGUF file in the making.

    Its header, which stands first, is known last: data goes to a file beside it and is appended to the header at the
    end, so that for a moment twice the disk space is needed.
    """

    def __init__(self, path: Path, names: Sequence[str], metadata: Mapping[str, Any]) -> None:
        if bad := [key for key, value in metadata.items() if not storable(value)]:
            raise HastenError(f"The value of {bad[0]!r} cannot stand in a GGUF file: numbers, texts and lists can.")
        if len(set(names)) != len(names):
            raise HastenError("The names of the tensors of a file must differ.")
        self.path, self.metadata = path, dict(metadata)
        self._missing = dict.fromkeys(names)
        self._infos: list[bytes] = []
        self._at = 0
        folder = ensure_folder(path.parent)
        self._temporary = folder / f".{path.name[:80]}.{secrets.token_hex(4)}.tmp"
        self._data_path = self._temporary.with_suffix(".data")
        self._data = self._data_path.open("xb")

    def add(self, name: str, entry: Entry) -> None:
        """Write one tensor; raises HastenError for what GGUF cannot hold."""
        if name not in self._missing:
            raise UnknownName("tensor still to be written", name, self._missing)
        type_id, data = _encoded(name, entry)
        shape = tuple(entry.weight.shape)
        stored = stored_shape(entry.weight)
        if stored != shape:
            self.metadata[ORIGINAL_SHAPE + name] = list(shape)
        dimensions = struct.pack(f"<I{len(stored)}Q", len(stored), *reversed(stored))
        self._infos.append(written_text(name) + dimensions + struct.pack("<IQ", type_id, self._at))
        self._append(data)
        del self._missing[name]

    def _append(self, data: torch.Tensor) -> None:
        self._data.write(data.cpu().contiguous().numpy().data)
        padding = -data.numel() % ALIGNMENT
        self._data.write(bytes(padding))
        self._at += data.numel() + padding

    def finish(self) -> None:
        """Put header and data together, and give the file its name."""
        if self._missing:
            raise HastenError(f"{len(self._missing)} tensors were not written, such as {next(iter(self._missing))!r}.")
        self._data.close()
        try:
            with self._data_path.open("rb") as data, self._temporary.open("xb") as file:
                file.write(self._header())
                shutil.copyfileobj(data, file, 1 << 24)
                file.flush()
                os.fsync(file.fileno())
            self._temporary.replace(self.path)
        finally:
            self.abandon()

    def _header(self) -> bytes:
        pairs = {**self.metadata, "general.quantization_version": self.metadata.get("general.quantization_version", 2)}
        counts = struct.pack("<IQQ", 3, len(self._infos), len(pairs))
        header = b"".join([MAGIC, counts, written_pairs(pairs), *self._infos])
        return header + bytes(-len(header) % ALIGNMENT)

    def abandon(self) -> None:
        """Remove what has been written, unless it is finished."""
        self._data.close()
        for path in (self._data_path, self._temporary):
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def stored_shape(weight: QuantizedWeight | torch.Tensor) -> tuple[int, ...]:
    """The shape that a tensor has in the file: its own, unless blocks run over its rows or ggml has too few dimensions.

    Then it is a matrix with rows of one block, or with one row for each output.
    """
    shape = tuple(weight.shape)
    kind = type_of(weight) if isinstance(weight, QuantizedWeight) else None
    if kind is not None and shape[-1] % kind.block:
        return math.prod(shape) // kind.block, kind.block
    return shape if len(shape) <= GREATEST_RANK else (shape[0], math.prod(shape[1:]))


def holds(entry: Entry) -> bool:
    """Can a GGUF file hold this entry as it is? It knows no treatment of inputs and no side branches."""
    given, weight = entry.given, entry.weight
    if given.smooth is not None or given.rotation != 1 or given.activations != "none" or entry.low_rank is not None:
        return False
    return type_of(weight) is not None if isinstance(weight, QuantizedWeight) else weight.dtype in PLAIN_IDS


def _encoded(name: str, entry: Entry) -> tuple[int, torch.Tensor]:
    """The number of a type, and bytes."""
    weight = entry.weight
    if not holds(entry):
        what = weight.number.name if isinstance(weight, QuantizedWeight) else weight.dtype
        raise HastenError(f"A GGUF file cannot hold {name!r} ({what}) as it is; quantize it to one of GGUF's types.")
    if not isinstance(weight, QuantizedWeight):
        return PLAIN_IDS[weight.dtype], weight.detach().contiguous().reshape(-1).view(torch.uint8)
    kind = type_of(weight)
    assert kind is not None
    return kind.id, kind.encode(weight)
