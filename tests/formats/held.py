"""Weights in memory that are read like a file, and a format of our own for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from hasten.formats.format import Entry, Reader


class Held(Reader):
    """A reader of entries in memory that counts what is read."""

    def __init__(self, entries: Mapping[str, Entry | torch.Tensor]) -> None:
        self.entries = {name: e if isinstance(e, Entry) else Entry(e) for name, e in entries.items()}
        self.metadata = {}
        self.reads: list[str] = []

    def names(self) -> Sequence[str]:
        return list(self.entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.entries[name].weight.shape)

    def read(self, name: str) -> Entry:
        self.reads.append(name)
        return self.entries[name]

    def close(self) -> None:
        self.entries = {}
