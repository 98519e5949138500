"""What a file format is: readers that give weights by name, writers that take them, both one weight at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch

from hasten.core.errors import HastenError
from hasten.kernels.modules import Input, LowRank
from hasten.kernels.weight import QuantizedWeight


class BadFile(HastenError):
    """A file that is damaged, hostile, or not what its name says; the message says where and what."""


@dataclass(frozen=True)
class Entry:
    """One named weight of a file: in codes, or plain; with what its layer does beside the product."""

    weight: QuantizedWeight | torch.Tensor
    given: Input = field(default_factory=Input)
    """What has to be done to the input of the layer (smoothing, rotation, rounding of activations)."""
    low_rank: LowRank | None = None
    notes: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the file says beside, on which the values do not depend, and which its own format needs to write the very
    same bytes again, such as the type that the weight had. Other formats leave it out."""


class Reader(ABC):
    """An open file. Names are the file's own; companions of a weight, such as its scales, are part of its entry."""

    metadata: Mapping[str, Any]
    """What the file says about itself, as plain data."""

    @abstractmethod
    def names(self) -> Sequence[str]:
        """Names of the entries in the order of the file."""

    @abstractmethod
    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a weight as its layer has it, without reading it."""

    @abstractmethod
    def read(self, name: str) -> Entry:
        """Read one entry. Tensors may be views of the mapped file: they are valid while the reader is open."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the file."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class Writer(ABC):
    """A file that is being written. It appears under its name when `finish` returns, whole or not at all."""

    @abstractmethod
    def add(self, name: str, entry: Entry) -> None:
        """Write one entry, which `Format.accepts`; it need not be kept in memory afterwards."""

    @abstractmethod
    def finish(self) -> None:
        """Complete the file and give it its name."""

    @abstractmethod
    def abandon(self) -> None:
        """Remove what has been written."""


class Format(ABC):
    """A way to store weights. One object for each, without state; `registry.formats` lists them."""

    name: ClassVar[str]
    """As in `hasten convert --format`."""
    kinds: ClassVar[tuple[str, ...]] = ()
    """What it can quantize to, such as Q4_K or nf4; the first is the default. Empty for one that only reads."""

    @abstractmethod
    def recognizes(self, path: Path) -> bool:
        """Is this a file (or folder) of the format? Looks at the beginning alone, and never raises for other files."""

    @abstractmethod
    def open(self, path: Path) -> Reader:
        """Open a file for reading; raises BadFile."""

    def create(self, path: Path, names: Sequence[str], metadata: Mapping[str, Any]) -> Writer:
        """Begin a file that will hold entries of these names."""
        raise HastenError(f"hasten reads {self.name}, and does not write it.")

    def accepts(self, entry: Entry) -> bool:
        """Can the format hold this entry as it is, without loss?"""
        return False

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """Quantize a plain weight to one of `kinds`; what the format leaves plain (biases, norms) comes back plain."""
        raise HastenError(f"hasten reads {self.name}, and does not write it.")
