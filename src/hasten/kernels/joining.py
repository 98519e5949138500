"""Quantized weights joined and cut along outputs and inputs: an exact rearrangement of codes, never dequantized."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from hasten.core.errors import HastenError
from hasten.kernels.numbers import Number
from hasten.kernels.packing import fits, pack, unpack
from hasten.kernels.weight import QuantizedWeight, Scales


class CannotJoin(HastenError):
    """Quantized weights that have no common form, or groups that cross a cut."""


def join_outputs(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight whose outputs are those of the parts one after the other, with the same values bit for bit.

    Scales of whole tensors become scales of rows where they differ. Raises CannotJoin for other inputs or codes.
    """
    first, rows = parts[0], [part.codes.shape[0] for part in parts]
    for part in parts[1:]:
        _same("inputs", first.shape[1:], part.shape[1:])
        _same("kinds of codes", first.number.name, part.number.name)
        _same("grids", first.columns * part.shape[0] * rows[0], part.columns * first.shape[0] * part.codes.shape[0])
        _same("columns", first.columns, part.columns)
    return replace(
        first,
        shape=(sum(part.shape[0] for part in parts), *first.shape[1:]),
        codes=torch.cat([part.codes for part in parts]),
        scale=_joined_scales([part.scale for part in parts], rows),
        minimum=None if _absent([part.minimum for part in parts], "minimums") else _minimums(parts, rows),
        zero=_stacked([part.zero for part in parts], rows, "zero points"),
        table=_common([part.table for part in parts], "tables of codes"),
    )


def join_inputs(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight, [outputs, sum of inputs], from weights of the same outputs; groups become as small as is needed."""
    first = parts[0]
    for part in parts:
        _needs_matrix(part)
        _same("outputs", first.shape[0], part.shape[0])
        _same("kinds of codes", first.number.name, part.number.name)
    columns = [part.columns for part in parts]
    no_minimum = _absent([part.minimum for part in parts], "minimums")
    return replace(
        first,
        shape=(first.shape[0], sum(columns)),
        columns=sum(columns),
        codes=_repacked(torch.cat([_plain(part) for part in parts], 1), first.number),
        scale=_beside([part.scale for part in parts], columns),
        minimum=None if no_minimum else _beside([p.minimum for p in parts if p.minimum], columns),
        zero=_widened([part.zero for part in parts], columns, "zero points"),
        table=_common([part.table for part in parts], "tables of codes"),
    )


def split_inputs(weight: QuantizedWeight, sizes: Sequence[int]) -> list[QuantizedWeight]:
    """Cut a weight into parts of so many inputs. Groups must not cross the cuts."""
    _needs_matrix(weight)
    if sum(sizes) != weight.columns:
        raise CannotJoin(f"A weight of {weight.columns} inputs cannot be cut into {list(sizes)}.")
    codes = _plain(weight)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    return [_inputs(weight, codes, start, start + size) for start, size in zip(starts, sizes, strict=True)]


def reshaped(weight: QuantizedWeight, shape: Sequence[int]) -> QuantizedWeight:
    """The same elements as a weight of another shape, such as a 1 x 1 convolution as a linear layer."""
    if math.prod(shape) != math.prod(weight.shape) or shape[0] != weight.shape[0]:
        raise CannotJoin(f"A weight of shape {list(weight.shape)} is no weight of shape {list(shape)}.")
    return replace(weight, shape=tuple(shape))


def _inputs(weight: QuantizedWeight, codes: torch.Tensor, start: int, end: int) -> QuantizedWeight:
    if weight.number.packed and not fits(end - start, weight.number.bits):
        raise CannotJoin(f"{end - start} inputs in codes of {weight.number.bits} bits do not fill whole bytes.")

    def cut(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else _cut(values, weight.columns, start, end)

    def cut_scales(scales: Scales) -> Scales:
        # Coarse scales are brought to the groups of the fine ones, so that they can be cut at the same places.
        coarse = None if scales.coarse is None else _repeated(scales.coarse, scales.codes.shape[1])
        return replace(scales, codes=_cut(scales.codes, weight.columns, start, end), coarse=cut(coarse))

    return replace(
        weight,
        shape=(weight.shape[0], end - start),
        columns=end - start,
        codes=_repacked(codes[:, start:end], weight.number),
        scale=cut_scales(weight.scale),
        minimum=None if weight.minimum is None else cut_scales(weight.minimum),
        zero=cut(weight.zero),
    )


def _cut(values: torch.Tensor, columns: int, start: int, end: int) -> torch.Tensor:
    groups = values.shape[1]
    if groups == 1:
        return values
    group = columns // groups
    if start % group or end % group:
        raise CannotJoin(f"Groups of {group} inputs cross the cut between {start} and {end}.")
    return values[:, start // group : end // group]


def _needs_matrix(weight: QuantizedWeight) -> None:
    if len(weight.shape) != 2 or weight.columns != weight.shape[1]:
        raise CannotJoin(
            f"A weight of shape {list(weight.shape)} in a grid of {weight.columns} columns cannot be cut or joined "
            "along its inputs."
        )


def _plain(weight: QuantizedWeight) -> torch.Tensor:
    return unpack(weight.codes, weight.number.bits, weight.columns) if weight.number.packed else weight.codes


def _repacked(codes: torch.Tensor, number: Number) -> torch.Tensor:
    return pack(codes, number.bits) if number.packed else codes.contiguous()


def _same(what: str, one: object, other: object) -> None:
    if one != other:
        raise CannotJoin(f"Weights with different {what} ({one} and {other}) cannot be joined.")


def _absent(items: Sequence[object], what: str) -> bool:
    missing = sum(item is None for item in items)
    if 0 < missing < len(items):
        raise CannotJoin(f"Weights with and without {what} cannot be joined.")
    return missing > 0


def _common(items: Sequence[torch.Tensor | None], what: str) -> torch.Tensor | None:
    """The tensor that all have."""
    if _absent(items, what):
        return None
    tensors = [item for item in items if item is not None]
    if not all(torch.equal(tensors[0], tensor) for tensor in tensors[1:]):
        raise CannotJoin(f"Weights with different {what} cannot be joined.")
    return tensors[0]


def _minimums(parts: Sequence[QuantizedWeight], rows: Sequence[int]) -> Scales:
    return _joined_scales([part.minimum for part in parts if part.minimum is not None], rows)


def _joined_scales(parts: Sequence[Scales], rows: Sequence[int]) -> Scales:
    codes = _stacked([part.codes for part in parts], rows, "scales")
    assert codes is not None
    coarse = _stacked([part.coarse for part in parts], rows, "coarse scales")
    table = _common([part.table for part in parts], "tables of scales")
    return Scales(codes, coarse, table, _common([part.offset for part in parts], "offsets of scales"))


def _alike(items: Sequence[torch.Tensor], what: str) -> list[torch.Tensor]:
    """The tensors in one type: that of all, or float32 where the types are floating but differ."""
    kinds = {item.dtype for item in items}
    if len(kinds) == 1:
        return list(items)
    if not all(kind.is_floating_point for kind in kinds):
        raise CannotJoin(f"Weights with {what} of the types {sorted(map(str, kinds))} cannot be joined.")
    return [item.float() for item in items]


def _stacked(items: Sequence[torch.Tensor | None], rows: Sequence[int], what: str) -> torch.Tensor | None:
    """Numbers by row and group one below the other; [1, groups] stays so if it is the same for all."""
    if _absent(items, what):
        return None
    tensors = _alike([item for item in items if item is not None], what)
    if all(item.shape[0] == 1 and item.shape == tensors[0].shape for item in tensors) and all(
        torch.equal(_bytes(item), _bytes(tensors[0])) for item in tensors
    ):
        return tensors[0]
    groups = max(item.shape[1] for item in tensors)
    wide = [_repeated(item, groups).expand(count, -1) for item, count in zip(tensors, rows, strict=True)]
    return torch.cat(wide)


def _bytes(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.uint8)


def _repeated(values: torch.Tensor, groups: int) -> torch.Tensor:
    if groups % values.shape[1]:
        raise CannotJoin(f"Weights with {values.shape[1]} and {groups} groups in a row cannot be joined.")
    return values if values.shape[1] == groups else values.repeat_interleave(groups // values.shape[1], 1)


def _beside(parts: Sequence[Scales], columns: Sequence[int]) -> Scales:
    codes = _widened([part.codes for part in parts], columns, "scales")
    assert codes is not None
    coarse = _widened([part.coarse for part in parts], columns, "coarse scales")
    if coarse is not None:
        # A coarse group has to be a whole number of fine ones.
        codes = _repeated(codes, math.lcm(codes.shape[1], coarse.shape[1]))
    table = _common([part.table for part in parts], "tables of scales")
    return Scales(codes, coarse, table, _common([part.offset for part in parts], "offsets of scales"))


def _widened(items: Sequence[torch.Tensor | None], columns: Sequence[int], what: str) -> torch.Tensor | None:
    """Numbers by row and group side by side, in groups of the greatest size that divides those of all parts."""
    if _absent(items, what):
        return None
    tensors = _alike([item for item in items if item is not None], what)
    group = math.gcd(*(count // item.shape[1] for item, count in zip(tensors, columns, strict=True)))
    wide = [_repeated(item, count // group) for item, count in zip(tensors, columns, strict=True)]
    rows = max(item.shape[0] for item in wide)
    return torch.cat([item.expand(rows, -1) for item in wide], 1)
