"""What a layout of a layer in ComfyUI's newer files is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from hasten.formats.checks import expect
from hasten.formats.format import Entry
from hasten.formats.mapped import TensorFile
from hasten.formats.tensors import stored_as


class Layout(ABC):
    """One of the layouts. `weight` holds the codes in all of them."""

    name: ClassVar[str]
    needed: ClassVar[Mapping[str, tuple[str, ...]]]
    """Types that each tensor may have, by the last part of its name."""
    optional: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    def tensors(self, file: TensorFile, base: str) -> dict[str, str]:
        """Names of the layer's tensors, after a look at their types."""
        there = {key: types for key, types in self.optional.items() if f"{base}.{key}" in file}
        wanted = {**self.needed, **there}
        for key, types in wanted.items():
            expect(file, f"{base}.{key}", types)
        expect(file, f"{base}.weight", self.needed["weight"], (None, None))
        return {key: f"{base}.{key}" for key in wanted}

    def shape(self, file: TensorFile, base: str) -> tuple[int, ...]:
        """Of the weight, from that of its codes."""
        rows, columns = file.info(f"{base}.weight").shape
        return rows, columns * (2 if file.info(f"{base}.weight").dtype == self.halves else 1)

    halves: ClassVar[str | None] = None
    """The type of the codes, if two share a byte."""

    @abstractmethod
    def read(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], notes: dict[str, Any]) -> Entry:
        """The entry."""

    @abstractmethod
    def facts(self, entry: Entry) -> dict[str, Any] | None:
        """The description of an entry; None if the layout cannot hold it."""

    def encode(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Its tensors by the last part of their names."""
        raise NotImplementedError

    def quantize(self, weight: torch.Tensor, options: Mapping[str, Any]) -> Entry:
        """Round a matrix."""
        raise NotImplementedError


def scale_of(scale: torch.Tensor, notes: Mapping[str, Any]) -> torch.Tensor:
    """A scale as files store it: a scalar, or [rows, 1]."""
    return stored_as(scale.reshape(()) if scale.numel() == 1 else scale, notes, "weight_scale")
