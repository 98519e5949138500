"""Reads GGUF files one tensor at a time, out of a memory map."""

from __future__ import annotations

import contextlib
import math
import mmap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hasten.core.errors import UnknownName
from hasten.formats.format import BadFile, Entry, Reader
from hasten.formats.gguf.header import ORIGINAL_SHAPE, Info, read_header
from hasten.formats.gguf.types import BY_ID, PLAIN


class GGUFReader(Reader):
    """An open GGUF file. Weights are copied out of it; what has been read does not stay in memory with the map."""

    metadata: Mapping[str, Any]
    """The file's keys, less those that say how it is laid out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise BadFile(f"{path} is empty.") from error
        except OSError as error:
            raise BadFile(f"Cannot read {path}: {(error.strerror or str(error)).lower()}.") from error
        try:
            header = read_header(self._map, path)
        except BaseException:
            self.close()
            raise
        self._tensors = header.tensors
        kept = {key: value for key, value in header.metadata.items() if not key.startswith(ORIGINAL_SHAPE)}
        kept.pop("general.alignment", None)
        self.metadata = kept

    def names(self) -> Sequence[str]:
        """Names of the tensors in the order of the header."""
        return tuple(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """The true shape of a tensor."""
        return self._info(name).shape

    def type_name(self, name: str) -> str:
        """The type of a tensor, such as F16 or Q4_K."""
        return self._info(name).type_name

    def read(self, name: str) -> Entry:
        """Read a tensor: plain, or in codes."""
        info = self._info(name)
        if not info.size:
            return Entry(torch.empty(info.shape, dtype=PLAIN.get(info.type_id, ("", torch.float32))[1]))
        data = self._bytes(info)
        try:
            if info.type_id in PLAIN:
                return Entry(data.clone().view(PLAIN[info.type_id][1]).reshape(info.shape))
            return Entry(BY_ID[info.type_id].decode(data, info.shape, _columns(info)))
        finally:
            del data
            self._forget(info)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        with contextlib.suppress(BufferError):  # Somebody still looks at it; it closes with the last of them.
            self._map.close()

    def _info(self, name: str) -> Info:
        if name not in self._tensors:
            raise UnknownName(f"tensor in {self.path.name}", name, self._tensors)
        return self._tensors[name]

    def _bytes(self, info: Info) -> torch.Tensor:
        with warnings.catch_warnings():
            # That the map cannot be written to; nothing is written.
            warnings.filterwarnings("ignore", message=".*not writable.*")
            return torch.frombuffer(self._map, dtype=torch.uint8, count=info.size, offset=info.start)

    def _forget(self, info: Info) -> None:
        if hasattr(mmap, "MADV_DONTNEED"):
            start = info.start // mmap.PAGESIZE * mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, start, info.start + info.size - start)


def _columns(info: Info) -> int:
    """Of the grid: the inputs of a row where blocks divide them, else the rows of the file."""
    inputs = math.prod(info.shape[1:] or info.shape)
    return inputs if inputs % BY_ID[info.type_id].block == 0 else info.stored[-1]
