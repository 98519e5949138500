"""Safetensors files mapped into memory: a tensor is a view of the file, and only what is looked at is read."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self, cast

import torch

from hasten.formats.format import BadFile
from hasten.formats.header import DTYPES, LARGEST_HEADER, Header, TensorInfo, read_header, strict_object

INDEX = ".safetensors.index.json"
"""How the name of the index of a checkpoint in several files ends."""
_MOST_SHARDS = 1000
_PAIR = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
"""The two files that nunchaku's older checkpoints consist of."""
_NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE: without it a copy-on-write mapping larger than the memory is refused."""


class TensorFile:
    """The tensors of a safetensors file, of an index with its shards, or of a folder that holds one of these.

    Raises BadFile when a file is damaged or hostile. Tensors are copy-on-write views: writing into one never changes
    the file, and one stays valid after `close`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._maps: list[mmap.mmap | None] = []
        self._places: dict[str, tuple[int, TensorInfo]] = {}
        self.metadata: dict[str, str] = {}
        for part in _parts(path):
            self._add(part)

    def _add(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                header = read_header(file, path)
                self._maps.append(_map(file.fileno()))
        except OSError as error:
            raise BadFile(f"Cannot read {path}: {(error.strerror or str(error)).lower()}.") from error
        self._take(header, path)

    def _take(self, header: Header, path: Path) -> None:
        if twice := sorted(self._places.keys() & header.tensors.keys()):
            raise BadFile(f"{path.name} holds {twice[0][:200]!r}, which another part of the checkpoint holds as well.")
        self._places |= {name: (len(self._maps) - 1, info) for name, info in header.tensors.items()}
        self.metadata |= header.metadata

    def names(self) -> list[str]:
        """Names of all tensors in the order of the bytes."""
        return sorted(self._places, key=lambda name: (self._places[name][0], self._places[name][1].start))

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def info(self, name: str) -> TensorInfo:
        """Type, shape and place of a tensor."""
        if name not in self._places:
            raise BadFile(f"{self.path.name} has no tensor {name[:200]!r}.")
        return self._places[name][1]

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the tensor's bytes; a copy where these lie at an odd place."""
        info = self.info(name)
        if info.dtype not in DTYPES:
            raise BadFile(f"{self.path.name}: tensor {name!r} has type {info.dtype}, for which there is no torch type.")
        dtype, shape = DTYPES[info.dtype], info.shape
        if info.dtype == "F4" and shape:
            shape = (*shape[:-1], shape[-1] // 2)
        mapped = self._maps[self._places[name][0]]
        if info.end == info.start or mapped is None:
            return torch.empty(shape, dtype=dtype)
        found = torch.frombuffer(mapped, dtype=torch.uint8, offset=info.start, count=info.end - info.start)
        found = found.clone() if info.start % dtype.itemsize else found
        return found.view(dtype).reshape(shape)

    def close(self) -> None:
        """Let go of the files; views that are still in use keep theirs."""
        # A mapping ends with its last view. Closing it here would leave views of nothing: torch locks no buffer.
        self._maps = [None] * len(self._maps)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map(descriptor: int) -> mmap.mmap:
    if sys.platform == "linux":
        access = mmap.PROT_READ | mmap.PROT_WRITE
        return mmap.mmap(descriptor, 0, flags=mmap.MAP_PRIVATE | _NO_RESERVE, prot=access)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)


def _parts(path: Path) -> Sequence[Path]:
    if path.is_dir():
        if all((path / name).is_file() for name in _PAIR):
            return [path / name for name in _PAIR]
        path = _in_folder(path)
    return _shards(path) if path.name.endswith(INDEX) else (path,)


def _in_folder(folder: Path) -> Path:
    """The one index, or the one file, of a folder."""
    for ending in (INDEX, ".safetensors"):
        found = sorted(item for item in folder.iterdir() if item.name.endswith(ending))
        if len(found) > 1:
            raise BadFile(f"{folder} holds {len(found)} files *{ending}; name one of them, such as {found[0].name}.")
        if found:
            return found[0]
    raise BadFile(f"{folder} holds no file *.safetensors.")


def _shards(index: Path) -> list[Path]:
    """The files that an index names; they lie beside it."""
    where = f"the index {index.name}"
    try:
        if index.stat().st_size > LARGEST_HEADER:
            raise BadFile(f"{where} is too large to be one.")
        entries = strict_object(index.read_bytes(), where).get("weight_map")
    except OSError as error:
        raise BadFile(f"Cannot read {index}: {(error.strerror or str(error)).lower()}.") from error
    if not isinstance(entries, dict) or not entries:
        raise BadFile(f"{where} has no weight_map.")
    names = list(dict.fromkeys(cast("Mapping[str, object]", entries).values()) if _texts(entries) else ())
    good = [name for name in names if isinstance(name, str) and Path(name).name == name and name not in ("", ".", "..")]
    if len(good) != len(names) or not 0 < len(names) <= _MOST_SHARDS:
        raise BadFile(f"{where} does not name files that lie beside it.")
    if missing := [name for name in good if not (index.parent / name).is_file()]:
        raise BadFile(f"{where} names {missing[0]}, which is not there.")
    return [index.parent / name for name in good]


def _texts(entries: object) -> bool:
    return all(isinstance(value, str) for value in cast("Mapping[str, object]", entries).values())
