"""What all formats on safetensors files share: entries made of several tensors, read and written one at a time."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from hasten.core.errors import HastenError, UnknownName
from hasten.formats.checks import check_entry
from hasten.formats.format import BadFile, Entry, Format, Reader, Writer
from hasten.formats.mapped import TensorFile
from hasten.formats.streamed import StreamedFile, room_for
from hasten.kernels.modules import Input
from hasten.kernels.weight import QuantizedWeight

MARKS = ("hasten", "tensor_names", "_quantization_metadata", "quantization_config", "scaled_fp8")
"""Metadata by which some format recognizes its files; they are not carried over into files of another."""
_FAILURES = (RuntimeError, ValueError, IndexError, TypeError, OverflowError, KeyError, ArithmeticError)
Closing = tuple[dict[str, torch.Tensor], dict[str, str]]
"""Tensors and metadata that end a file."""
_SUFFIXES = (".weight", ".bias")


@dataclass(frozen=True)
class Part:
    """An entry that is made of several tensors of a file."""

    shape: tuple[int, ...]
    """Of the weight as its layer has it."""
    tensors: tuple[str, ...]
    """Names of the tensors, which are no entries of their own."""
    read: Callable[[], Entry]


class TensorReader(Reader):
    """An open safetensors file as entries: what `parts` names, and every other tensor as it is."""

    def __init__(self, file: TensorFile, parts: Mapping[str, Part], ignored: Collection[str] = ()) -> None:
        self.file, self.metadata = file, dict(file.metadata)
        self._parts = dict(parts)
        owners = {tensor: name for name, part in parts.items() for tensor in part.tensors}
        order = (owners.get(tensor, tensor) for tensor in file.names() if tensor not in ignored)
        self._names = list(dict.fromkeys(order))

    def names(self) -> Sequence[str]:
        """Names of the entries in the order of the file."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight as its layer has it."""
        return self._parts[name].shape if name in self._parts else self.file.info(self._known(name)).shape

    def read(self, name: str) -> Entry:
        """One entry; its tensors may be views of the file."""
        where = f"{self.file.path.name}: {name!r}"
        if name not in self._parts:
            return Entry(self.file.tensor(self._known(name)))
        try:
            return check_entry(self._parts[name].read(), where)
        except _FAILURES as error:
            raise BadFile(f"{where} cannot be read: {str(error)[:200]}.") from error

    def close(self) -> None:
        """Let go of the file."""
        self.file.close()

    def _known(self, name: str) -> str:
        if name not in self._names:
            raise UnknownName("entry", name, self._names)
        return name


class TensorFormat(Format):
    """A layout of quantized weights in safetensors files."""

    companions: ClassVar[int] = 1
    """Tensors that an entry takes at most, as a rule; room for the header is kept accordingly."""

    def recognizes(self, path: Path) -> bool:
        """Looks at the header (and configuration) alone."""
        if not path.is_dir() and not path.name.endswith((".safetensors", ".json", ".sft")):
            return False
        try:
            with TensorFile(path) as file:
                return self.claims(file)
        except (HastenError, OSError):
            return False

    holds_computation: ClassVar[bool] = False
    """Does it hold (or imply) the type of the product, and a threshold for channels that are left out of rounding?"""

    @abstractmethod
    def claims(self, file: TensorFile) -> bool:
        """Is this an open file of the format?"""

    def open(self, path: Path) -> Reader:
        """Open a file, an index of shards, or a folder with one of these."""
        file = TensorFile(path)
        try:
            return self.reader(file)
        except _FAILURES as error:
            file.close()
            raise BadFile(f"{path.name} is no file of format {self.name}: {str(error)[:200]}.") from error
        except BaseException:
            file.close()
            raise

    def reader(self, file: TensorFile) -> Reader:
        """The reader of an open file."""
        return TensorReader(file, self.parts(file))

    def parts(self, file: TensorFile) -> Mapping[str, Part]:
        """The entries that are made of several tensors, by name."""
        return {}

    def create(self, path: Path, names: Sequence[str], metadata: Mapping[str, Any]) -> TensorWriter:
        """Begin a file; metadata that are no text are written as JSON."""
        kept = {key: value for key, value in metadata.items() if key not in MARKS and not key.endswith(_SUFFIXES)}
        return TensorWriter(self, path, names, {key: _text(value) for key, value in kept.items()})

    def accepts(self, entry: Entry) -> bool:
        """Plain tensors, and what `encodes` says."""
        if isinstance(entry.weight, torch.Tensor):
            return entry.given == Input() and entry.low_rank is None
        extra = entry.given.threshold or entry.given.compute is not None
        return (self.holds_computation or not extra) and self.encodes(entry)

    def encodes(self, entry: Entry) -> bool:
        """Can it hold this entry, whose weight is in codes?"""
        return False

    def encode(self, name: str, entry: Entry) -> Mapping[str, torch.Tensor]:
        """The tensors of an entry whose weight is in codes, by name."""
        raise HastenError(f"{self.name} does not hold quantized weights such as {name!r}.")

    def noted(self, entry: Entry) -> Mapping[str, Any]:
        """What of a coded entry `closing` needs; its notes, unless a format says otherwise."""
        return entry.notes

    def closing(self, entries: Mapping[str, Mapping[str, Any]], plain: Sequence[str]) -> Closing:
        """What ends a file with these coded entries, given with what is `noted` of them, and these plain ones."""
        return {}, {}


class TensorWriter(Writer):
    """A safetensors file of some format in the making."""

    def __init__(self, layout: TensorFormat, path: Path, names: Sequence[str], metadata: Mapping[str, str]) -> None:
        self.layout, self.metadata = layout, dict(metadata)
        self.file = StreamedFile(path, room_for(list(names), metadata, layout.companions))
        self.coded: dict[str, Mapping[str, Any]] = {}
        self.plain: list[str] = []

    def add(self, name: str, entry: Entry) -> None:
        """Write one entry."""
        if not self.layout.accepts(entry):
            raise HastenError(
                f"{self.layout.name} cannot hold {name!r} as it is; quantize it to one of its kinds first."
            )
        if isinstance(entry.weight, torch.Tensor):
            self.file.add(name, entry.weight)
            self.plain.append(name)
            return
        for key, tensor in self.layout.encode(name, entry).items():
            self.file.add(key, tensor)
        self.coded[name] = self.layout.noted(entry)

    def finish(self) -> None:
        """Complete the file."""
        tensors, metadata = self.layout.closing(self.coded, self.plain)
        for name, tensor in tensors.items():
            self.file.add(name, tensor)
        self.file.finish(self.metadata | metadata)

    def abandon(self) -> None:
        """Remove what has been written."""
        self.file.abandon()


def base_of(name: str) -> str:
    """The layer of a weight: its name without `.weight`."""
    return name.removesuffix(".weight")


def is_linear(name: str, weight: torch.Tensor) -> bool:
    """Is it a weight worth coding: a matrix in a numbered block, in floating point, with sides that 16 divides?"""
    parts = name.removesuffix(".weight").split(".")
    numbered = any(part.isdigit() and _named(parts[index + 1 :]) for index, part in enumerate(parts))
    matrix = weight.ndim == 2 and weight.is_floating_point() and weight.element_size() > 1
    return numbered and matrix and name.endswith(".weight") and not any(size % 16 for size in weight.shape)


def _named(parts: Sequence[str]) -> bool:
    """Is it a layer of a block, and not itself but numbered, as in `time_embed.2`?"""
    return any(not part.isdigit() for part in parts)


def chosen(kind: str, layout: Format) -> str:
    """The kind itself, if the format knows it."""
    if kind not in layout.kinds:
        raise UnknownName(f"kind of {layout.name}", kind, layout.kinds)
    return kind


def stored_as(tensor: torch.Tensor, notes: Mapping[str, Any], key: str) -> torch.Tensor:
    """A tensor in the shape that it had in the file it came from, if that is known and fits."""
    shapes = notes.get("shapes")
    shape = shapes.get(key) if isinstance(shapes, Mapping) else None
    return tensor if shape is None or torch.Size(shape).numel() != tensor.numel() else tensor.reshape(shape)


def coded(entry: Entry) -> QuantizedWeight:
    """The weight of an entry that is known to be in codes."""
    assert isinstance(entry.weight, QuantizedWeight)
    return entry.weight


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
