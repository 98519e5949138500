"""Checks of weights that come from files: a wrong shape is found before it is computed with."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import get_args

import torch

from hasten.formats.format import BadFile, Entry
from hasten.formats.header import TensorInfo
from hasten.formats.mapped import TensorFile
from hasten.kernels.activations import Activations
from hasten.kernels.packing import fits
from hasten.kernels.weight import QuantizedWeight, Scales

FLOATS = ("F32", "BF16", "F16")
_LARGEST_ROTATION = 1 << 16
_WIDE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NARROW = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu)
_SCALES = (*_WIDE, *_NARROW, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
"""Types that scales and zeros may have."""


def expect(
    file: TensorFile, name: str, dtypes: Collection[str] | str, shape: Sequence[int | None] | None = None
) -> TensorInfo:
    """The description of a tensor, which must have one of the types and the shape (None: any size)."""
    info = file.info(name)
    allowed = (dtypes,) if isinstance(dtypes, str) else dtypes
    if info.dtype not in allowed:
        raise BadFile(f"{file.path.name}: {name!r} is of type {info.dtype}, and should be {' or '.join(allowed)}.")
    if shape is not None and not _matches(info.shape, shape):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise BadFile(f"{file.path.name}: {name!r} has shape {list(info.shape)}, and should have [{wanted}].")
    return info


def _matches(shape: Sequence[int], wanted: Sequence[int | None]) -> bool:
    return len(shape) == len(wanted) and all(w in (None, s) for s, w in zip(shape, wanted, strict=True))


def check_entry(entry: Entry, where: str) -> Entry:
    """The entry itself, if all its parts fit together; raises BadFile."""
    weight = entry.weight
    if isinstance(weight, QuantizedWeight):
        _check_weight(weight, where)
    outputs, inputs = weight.shape[0] if weight.shape else 0, math.prod(weight.shape[1:])
    given, pair = entry.given, entry.low_rank
    _require(given.activations in get_args(Activations), where, f"{given.activations!r} is no kind of activations")
    _require(given.smooth is None or given.smooth.shape == (inputs,), where, "smoothing does not fit its inputs")
    turn = given.rotation
    good = 0 < turn <= _LARGEST_ROTATION and turn & (turn - 1) == 0 and inputs % turn == 0
    _require(good, where, f"its inputs cannot be rotated in groups of {turn}")
    _require(given.scale is None or given.scale.numel() == 1, where, "it has several scales for one input")
    beside = (given.smooth, given.scale, *((pair.down, pair.up) if pair else ()))
    _require(
        all(item is None or item.dtype in _WIDE for item in beside), where, "what its input needs is of a wrong type"
    )
    if pair is not None:
        fitting = pair.down.ndim == pair.up.ndim == 2 and pair.down.shape == (pair.up.shape[1], inputs)
        _require(fitting and pair.up.shape[0] == outputs, where, "its side branch does not fit it")
    return entry


def _check_weight(weight: QuantizedWeight, where: str) -> None:
    number, columns, size = weight.number, weight.columns, math.prod(weight.shape)
    _require(len(weight.shape) >= 1 and size > 0 and columns > 0, where, "it is empty")
    _require(size % columns == 0, where, f"its {size} numbers do not fill rows of {columns}")
    rows = size // columns
    _require(not number.packed or fits(columns, number.bits), where, f"rows of {columns} codes do not fill bytes")
    stored = columns * number.bits // 8 if number.packed else columns
    _require(weight.codes.shape == (rows, stored), where, f"its codes have shape {list(weight.codes.shape)}")
    _require(weight.codes.dtype == number.dtype, where, f"its codes are of type {weight.codes.dtype}")
    for scales in (weight.scale, weight.minimum):
        if scales is not None:
            _check_scales(scales, rows, columns, where)
    if weight.zero is not None:
        _check_grid(weight.zero, rows, columns, where)
    table = weight.table
    _require((table is not None) == (number.kind == "table"), where, "it lacks a table, or has one for nothing")
    fitting = table is None or (table.shape == (1 << number.bits,) and table.dtype in _WIDE)
    _require(fitting, where, "its table has the wrong length or type")


def _check_scales(scales: Scales, rows: int, columns: int, where: str) -> None:
    _check_grid(scales.codes, rows, columns, where)
    if scales.coarse is not None:
        _check_grid(scales.coarse, rows, scales.codes.shape[1], where)
    coded = not scales.codes.is_floating_point()
    if scales.table is not None:
        _require(coded and scales.codes.dtype == torch.uint8, where, "its scales have a table and are no bytes")
        fitting = scales.table.shape == (256,) and scales.table.dtype in _WIDE
        _require(fitting, where, "the table of its scales has the wrong length or type")
    one = scales.offset is None or (scales.offset.numel() == 1 and scales.offset.dtype in _WIDE)
    _require(one, where, "its scales have several offsets, or one of a wrong type")


def _check_grid(values: torch.Tensor, rows: int, columns: int, where: str) -> None:
    grid = values.ndim == 2 and values.shape[0] in (1, rows) and values.shape[1] and not columns % values.shape[1]
    good = grid and values.dtype in _SCALES
    _require(bool(good), where, f"scales or zeros of shape {list(values.shape)} do not divide {rows} x {columns}")


def _require(good: bool, where: str, problem: str) -> None:
    if not good:
        raise BadFile(f"{where}: {problem}.")
