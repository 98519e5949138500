"""The one form of a quantized weight: codes, scales by group, and what else a format needs to be read exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch

from hasten.kernels.numbers import NUMBERS, Number, decode


@dataclass(frozen=True)
class Scales:
    """Numbers by row and group, which formats store as they are or once more as codes.

    `values()` is `table[codes]` (or the codes themselves) times `coarse` plus `offset`, computed in float32.
    """

    codes: torch.Tensor
    """[rows or 1, groups or 1]: floating point (8 to 32 bits), or integer codes."""
    coarse: torch.Tensor | None = None
    """[rows or 1, fewer groups]: the scale of the scales, in floating point."""
    table: torch.Tensor | None = None
    """[up to 256] float32: what integer codes stand for."""
    offset: torch.Tensor | None = None
    """[] float32: added at the end."""

    def values(self) -> torch.Tensor:
        """The numbers, float32 [rows or 1, groups or 1]."""
        found = self.codes.float() if self.table is None else self.table[self.codes.int()]
        if self.coarse is not None:
            found = found * spread(self.coarse.float(), found.shape[1])
        return found if self.offset is None else found + self.offset

    def rows(self, start: int, end: int) -> Scales:
        """Those of some rows."""
        coarse = None if self.coarse is None else _rows(self.coarse, start, end)
        return replace(self, codes=_rows(self.codes, start, end), coarse=coarse)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight in codes. Its elements, row by row, are arranged in a grid [rows, columns] that groups divide.

    The value of an element is `scale * (code - zero) - minimum`, computed in float32 in this order, where `code` is
    read as `number` says. Usually the grid is the matrix [outputs, inputs]; formats whose blocks run on from row to
    row have a grid of other proportions. Nothing is lost: every format that hasten reads maps into it exactly, and
    from it back to the same bytes.
    """

    shape: tuple[int, ...]
    """Of the weight as its layer has it: [outputs, inputs] or [outputs, inputs, height, width]."""
    number: Number
    columns: int
    """Columns of the grid."""
    codes: torch.Tensor
    """[rows, columns], or packed (see `kernels.packing`) [rows, columns * bits / 8]."""
    scale: Scales
    minimum: Scales | None = None
    zero: torch.Tensor | None = None
    """[rows or 1, groups or 1]: the code that stands for 0; integer or floating point."""
    table: torch.Tensor | None = None
    """[2**bits] float32: what the codes stand for, if `number` is a table."""

    @property
    def groups(self) -> int:
        """Groups in a row of the grid."""
        return max(self.scale.codes.shape[1], self.minimum.codes.shape[1] if self.minimum else 1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The values, in the weight's shape."""
        found = decode(self.codes, self.number, self.columns, self.table)
        if self.zero is not None:
            found = found - spread(self.zero.float(), self.columns)
        found = found * spread(self.scale.values(), self.columns)
        if self.minimum is not None:
            found = found - spread(self.minimum.values(), self.columns)
        return found.reshape(self.shape).to(dtype)

    def split(self, sizes: Sequence[int]) -> list[QuantizedWeight]:
        """Cut a fused weight into parts of so many outputs, without dequantizing. Groups must not cross the cuts."""
        rows, outputs = self.codes.shape[0], self.shape[0]
        if sum(sizes) != outputs:
            raise ValueError(f"a weight of {outputs} outputs cannot be cut into {list(sizes)}.")
        if any(size * rows % outputs for size in sizes):
            raise ValueError(f"groups of the weight cross the borders between {list(sizes)} outputs.")
        ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
        return [
            self._part((end - size) * rows // outputs, end * rows // outputs, size)
            for end, size in zip(ends, sizes, strict=True)
        ]

    def _part(self, start: int, end: int, outputs: int) -> QuantizedWeight:
        return replace(
            self,
            shape=(outputs, *self.shape[1:]),
            codes=self.codes[start:end],
            scale=self.scale.rows(start, end),
            minimum=None if self.minimum is None else self.minimum.rows(start, end),
            zero=None if self.zero is None else _rows(self.zero, start, end),
        )

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name: `codes`, `scale`, `scale_coarse`, ..., `zero`, `table`."""
        return dict(_named(self))

    @classmethod
    def of(
        cls, shape: Sequence[int], number: str, columns: int, tensors: Mapping[str, torch.Tensor]
    ) -> QuantizedWeight:
        """Put together what `tensors()` took apart."""
        return cls(
            shape=tuple(shape),
            number=NUMBERS[number],
            columns=columns,
            codes=tensors["codes"],
            scale=_scales("scale", tensors),
            minimum=_scales("minimum", tensors) if "minimum" in tensors else None,
            zero=tensors.get("zero"),
            table=tensors.get("table"),
        )

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> QuantizedWeight:
        """The same weight with `change` done to each tensor, such as a move to a device."""
        changed = {name: change(tensor) for name, tensor in self.tensors().items()}
        return QuantizedWeight.of(self.shape, self.number.name, self.columns, changed)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits that a number takes, scales and all."""
        return 8 * self.nbytes / (self.codes.shape[0] * self.columns)


_SCALED = (f"{kind}{part}" for kind in ("scale", "minimum") for part in ("", "_coarse", "_table", "_offset"))
TENSORS = ("codes", *_SCALED, "zero", "table")
"""Names of the tensors that a quantized weight may have."""


def spread(values: torch.Tensor, columns: int) -> torch.Tensor:
    """Repeat numbers by group, [rows, groups], so that each column has its own: [rows, columns]; 1 group stays 1."""
    groups = values.shape[1]
    return values if groups in (1, columns) else values.repeat_interleave(columns // groups, 1)


def _named(weight: QuantizedWeight) -> Iterator[tuple[str, torch.Tensor]]:
    yield "codes", weight.codes
    for kind, scales in (("scale", weight.scale), ("minimum", weight.minimum)):
        for item in fields(Scales) if scales is not None else ():
            if (value := getattr(scales, item.name)) is not None:
                yield kind if item.name == "codes" else f"{kind}_{item.name}", value
    if weight.zero is not None:
        yield "zero", weight.zero
    if weight.table is not None:
        yield "table", weight.table


def _scales(kind: str, tensors: Mapping[str, torch.Tensor]) -> Scales:
    get = tensors.get
    return Scales(tensors[kind], get(f"{kind}_coarse"), get(f"{kind}_table"), get(f"{kind}_offset"))


def _rows(values: torch.Tensor, start: int, end: int) -> torch.Tensor:
    return values if values.shape[0] == 1 else values[start:end]
