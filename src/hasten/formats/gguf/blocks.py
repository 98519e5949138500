"""The types of GGUF's tensors: blocks of numbers that share scales, and how they map into quantized weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import cast

import torch

from hasten.kernels.numbers import NUMBERS
from hasten.kernels.packing import pack, unpack
from hasten.kernels.weight import QuantizedWeight, Scales

CHUNK = 1 << 20
"""Numbers that are converted at a time, so that what is unpacked stays small."""


@dataclass(frozen=True)
class Blocks:
    """The fields of n blocks, one tensor each."""

    codes: torch.Tensor
    """[n, block] uint8, or int8 where codes fill signed bytes."""
    scale: torch.Tensor
    """[n, groups]: float16, or integer codes that `coarse` or a table scales."""
    coarse: torch.Tensor | None = None
    """[n, 1] float16."""
    minimum: torch.Tensor | None = None
    """[n, groups]: what is subtracted; float16, or integer codes that `minimum_coarse` scales."""
    minimum_coarse: torch.Tensor | None = None
    """[n, 1] float16."""


@dataclass(frozen=True, eq=False)
class BlockType:
    """One of ggml's types that store numbers in blocks."""

    name: str
    id: int
    block: int
    """Numbers in a block."""
    size: int
    """Bytes of a block."""
    number: str
    """What the codes are, one of `kernels.numbers.NUMBERS`."""
    groups: int
    """Groups of a block that have a scale each."""
    read: Callable[[torch.Tensor], Blocks]
    """Bytes, uint8 [n, size], to fields."""
    write: Callable[[Blocks], torch.Tensor] | None = None
    """The inverse; None for a type that is read alone."""
    table: torch.Tensor | None = None
    """What codes stand for, if they are no integers."""
    scale_table: torch.Tensor | None = None
    """What the codes of scales stand for, if they are no integers."""
    scale_range: tuple[int, int] = (-128, 255)
    """Least and greatest code of a scale (and of a minimum) that fits."""
    zero: int | None = None
    """The code that stands for 0, if the number has no sign of its own."""
    nested: bool = False
    """Are the scales codes with a float16 scale of their own?"""
    minimum: bool = False
    """Is something subtracted?"""

    def decode(self, data: torch.Tensor, shape: tuple[int, ...], columns: int) -> QuantizedWeight:
        """The weight in `data`, uint8 of whole blocks, on a grid of so many columns."""
        step = max(CHUNK // self.block, 1) * self.size
        parts = [self.read(part.reshape(-1, self.size)) for part in data.split(step)]
        return self.weight(joined(parts), shape, columns)

    def weight(self, blocks: Blocks, shape: tuple[int, ...], columns: int) -> QuantizedWeight:
        """Fields of blocks, in the order of the weight's elements, as a quantized weight."""
        number = NUMBERS[self.number]
        rows = blocks.codes.numel() // columns
        codes = blocks.codes.reshape(rows, columns)
        scale = Scales(
            blocks.scale.reshape(rows, -1), _by_row(blocks.coarse, rows), _on(self.scale_table, blocks.codes)
        )
        minimum = None
        if blocks.minimum is not None:
            minimum = Scales(blocks.minimum.reshape(rows, -1), _by_row(blocks.minimum_coarse, rows))
        return QuantizedWeight(
            shape=shape,
            number=number,
            columns=columns,
            codes=pack(codes, number.bits) if number.packed else codes,
            scale=scale,
            minimum=minimum,
            zero=None if self.zero is None else codes.new_full((1, 1), self.zero),
            table=_on(self.table, blocks.codes),
        )

    def encode(self, weight: QuantizedWeight) -> torch.Tensor:
        """The bytes of a weight that `holds` said yes to: uint8 of whole blocks."""
        assert self.write is not None
        rows = max(CHUNK // weight.columns, 1)
        parts = [self.write(self._fields(weight, at, at + rows)) for at in range(0, weight.codes.shape[0], rows)]
        return torch.cat(parts).flatten()

    def _fields(self, weight: QuantizedWeight, start: int, end: int) -> Blocks:
        number, codes = weight.number, weight.codes[start:end]
        plain = unpack(codes, number.bits, weight.columns) if number.packed else codes
        scale = weight.scale.rows(start, end)
        minimum = None if weight.minimum is None else weight.minimum.rows(start, end)
        return Blocks(
            codes=plain.reshape(-1, self.block),
            scale=scale.codes.reshape(-1, self.groups),
            coarse=None if scale.coarse is None else scale.coarse.reshape(-1, 1),
            minimum=None if minimum is None else minimum.codes.reshape(-1, self.groups),
            minimum_coarse=None if minimum is None or minimum.coarse is None else minimum.coarse.reshape(-1, 1),
        )

    def holds(self, weight: QuantizedWeight) -> bool:
        """Can this type store the weight as it is?"""
        if self.write is None or weight.number.name != self.number or weight.columns % self.block:
            return False
        if (weight.minimum is not None) != self.minimum or not _same(weight.table, self.table):
            return False
        if not _same(weight.zero, None if self.zero is None else torch.tensor([[self.zero]])):
            return False
        scales = [weight.scale] if weight.minimum is None else [weight.scale, weight.minimum]
        return all(self._holds_scales(item, weight) for item in scales)

    def _holds_scales(self, scales: Scales, weight: QuantizedWeight) -> bool:
        rows, groups = weight.codes.shape[0], weight.columns // self.block
        if scales.offset is not None or not _same(scales.table, self.scale_table):
            return False
        if scales.codes.shape != (rows, groups * self.groups):
            return False
        if not self.nested and self.scale_table is None:
            return scales.coarse is None and scales.codes.dtype == torch.float16
        if (scales.coarse is not None) != self.nested or scales.codes.is_floating_point():
            return False
        if scales.coarse is not None and (scales.coarse.dtype, scales.coarse.shape) != (torch.float16, (rows, groups)):
            return False
        least, greatest = self.scale_range
        low, high = scales.codes.aminmax()
        return least <= low.item() and high.item() <= greatest


def joined(parts: list[Blocks]) -> Blocks:
    """Several runs of blocks as one."""
    if len(parts) == 1:
        return parts[0]
    found = {}
    for item in fields(Blocks):
        tensors = [getattr(part, item.name) for part in parts]
        found[item.name] = None if tensors[0] is None else torch.cat(cast("list[torch.Tensor]", tensors))
    return Blocks(**found)


def _by_row(values: torch.Tensor | None, rows: int) -> torch.Tensor | None:
    return None if values is None else values.reshape(rows, -1)


def _on(table: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    # A copy for each weight: safetensors refuses tensors that share memory.
    return None if table is None else table.to(like.device, copy=True)


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool((one.float().cpu() == other.float()).all())
