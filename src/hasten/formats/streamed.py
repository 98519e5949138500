"""Safetensors files written tensor by tensor: what has been written need not be kept in memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Protocol, cast

import torch

from hasten.core.errors import HastenError
from hasten.core.files import ensure_folder
from hasten.formats.header import LARGEST_HEADER, NAMES

_CHUNK = 16 << 20
_HELD_BACK = 1 << 20
"""Tensors up to so many bytes, if these are no multiple of 8, are written last, so that all others lie aligned."""
_SMALLEST = 512
_OF_A_TENSOR = 120
"""Bytes that a tensor's entry in the header takes beside its name, at most as a rule."""


def room_for(names: Mapping[str, int] | list[str], metadata: Mapping[str, str], tensors: int = 1) -> int:
    """Bytes to keep free for a header with so many `tensors` for each name."""
    each = sum(len(json.dumps(name)) + _OF_A_TENSOR for name in names)
    return _SMALLEST + tensors * each + len(json.dumps(dict(metadata)))


class StreamedFile:
    """A safetensors file in the making.

    The header comes first and is known last, so room is kept for it; where that is too little, the tensors move up.
    The file appears under its name when `finish` returns, whole or not at all.
    """

    def __init__(self, path: Path, room: int = _SMALLEST) -> None:
        self.path = path
        ensure_folder(path.parent)
        self._room = _even(min(room, LARGEST_HEADER))
        self._temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
        self._entries: dict[str, dict[str, object]] = {}
        self._held: dict[str, torch.Tensor] = {}
        self._length = 0
        try:
            self._file: BinaryIO = self._temporary.open("x+b")
            self._file.seek(8 + self._room)
        except OSError as error:
            raise self._failure(error) from error

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor; each name once. A small one may be kept until the end."""
        if name in self._entries or name in self._held or name == "__metadata__":
            raise HastenError(f"{name!r} has been written to {self.path.name} before.")
        if tensor.dtype not in NAMES:
            raise HastenError(f"{name!r} is of type {tensor.dtype}, which safetensors files do not hold.")
        if tensor.nbytes % 8 and tensor.nbytes <= _HELD_BACK:
            self._held[name] = tensor.detach().clone()
        else:
            self._write(name, tensor)

    def _write(self, name: str, tensor: torch.Tensor) -> None:
        try:
            self._file.write(bytes_of(tensor))
        except OSError as error:
            raise self._failure(error) from error
        offsets = [self._length, self._length + tensor.nbytes]
        self._length = offsets[1]
        self._entries[name] = {"dtype": NAMES[tensor.dtype], "shape": _shape(tensor), "data_offsets": offsets}

    def finish(self, metadata: Mapping[str, str], *, checksum: bool = False) -> str | None:
        """Write the header, give the file its name, and return its SHA-256 in hexadecimal digits if asked for."""
        for name, tensor in sorted(self._held.items(), key=lambda item: -item[1].element_size()):
            self._write(name, tensor)
        try:
            self._write_header(metadata)
            self._file.flush()
            found = self._sha256() if checksum else None
            self._file.close()
            self._temporary.replace(self.path)
        except OSError as error:
            raise self._failure(error) from error
        return found

    def _write_header(self, metadata: Mapping[str, str]) -> None:
        head = {"__metadata__": dict(metadata)} if metadata else {}
        text = json.dumps(head | self._entries, separators=(",", ":")).encode()
        if len(text) > LARGEST_HEADER:
            raise HastenError(
                f"The header of {self.path.name} would take {len(text)} bytes, too many to be read again."
            )
        if len(text) > self._room:
            self._move_up(_even(len(text)) - self._room)
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + text.ljust(self._room))

    def _move_up(self, by: int) -> None:
        start, end = 8 + self._room, 8 + self._room + self._length
        while end > start:
            place = max(start, end - _CHUNK)
            self._file.seek(place)
            data = self._file.read(end - place)
            self._file.seek(place + by)
            self._file.write(data)
            end = place
        self._room += by

    def _sha256(self) -> str:
        self._file.seek(0)
        return hashlib.file_digest(cast("_Readable", self._file), "sha256").hexdigest()

    def abandon(self) -> None:
        """Remove what has been written."""
        self._file.close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _failure(self, error: OSError) -> HastenError:
        if hasattr(self, "_file"):
            self.abandon()
        return HastenError(f"Cannot write {self.path}: {(error.strerror or str(error)).lower()}.")


class _Readable(Protocol):
    """What `hashlib.file_digest` asks for."""

    def readinto(self, buf: bytearray, /) -> int: ...
    def readable(self) -> bool: ...


def write_tensors(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    checksum: bool = False,
) -> str | None:
    """Write tensors that are all in memory as one file; return its SHA-256 if asked for."""
    file = StreamedFile(path, room_for(list(tensors), metadata or {}))
    try:
        for name, tensor in tensors.items():
            file.add(name, tensor)
        return file.finish(metadata or {}, checksum=checksum)
    except BaseException:
        file.abandon()
        raise


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor in row-major order."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # A single number counts as contiguous whatever its stride is, and `view` asks for a stride of 1.
    return flat.as_strided((flat.numel(),), (1,)).view(torch.uint8).numpy().data


def _shape(tensor: torch.Tensor) -> list[int]:
    shape = list(tensor.shape)
    return [*shape[:-1], 2 * shape[-1]] if tensor.dtype == torch.float4_e2m1fn_x2 and shape else shape


def _even(size: int) -> int:
    return -(-size // 8) * 8
