"""The header of a safetensors file, read as if an enemy had written it.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> type, shape and offsets of a tensor,
and `__metadata__`, names -> text), and the tensors' bytes without gaps.
Source: https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, cast

import torch

from hasten.formats.format import BadFile

LARGEST_HEADER = 32 << 20
"""Bytes of a header at most: room for some 200 000 tensors."""
MOST_BRACKETS = 1_000_000
"""Lists and objects in JSON text at most: what bounds the memory that parsing takes."""
MOST_DIMENSIONS = 8

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "U16": torch.uint16,
    "I32": torch.int32, "U32": torch.uint32, "I64": torch.int64, "U64": torch.uint64, "F16": torch.float16,
    "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz, "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip
"""Types of tensors by the name that files use."""
NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the header describes it."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    end: int
    """First byte after it."""


@dataclass(frozen=True)
class Header:
    """What a file says about itself."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def strict_json(text: str | bytes, where: str) -> object:
    """Parse JSON from a file; raises BadFile for what is no JSON, names twice, NaN, and text made to fill memory."""
    brackets = text.count(b"[") + text.count(b"{") if isinstance(text, bytes) else text.count("[") + text.count("{")
    if len(text) > LARGEST_HEADER or brackets > MOST_BRACKETS:
        raise BadFile(f"{where} is too large to be what it should be.")
    try:
        plain = text.decode() if isinstance(text, bytes) else text
        return json.loads(plain, object_pairs_hook=_once_each, parse_constant=_no_constant)
    except RecursionError as error:
        raise BadFile(f"{where} is nested too deeply.") from error
    except ValueError as error:
        raise BadFile(f"{where} is not valid JSON: {str(error)[:200]}.") from error


def strict_object(text: str | bytes, where: str) -> dict[str, object]:
    """Like `strict_json`, for text that must be an object."""
    found = strict_json(text, where)
    if not isinstance(found, dict):
        raise BadFile(f"{where} is no JSON object.")
    return cast("dict[str, object]", found)


def read_header(file: BinaryIO, path: Path) -> Header:
    """Read and check the header of an open file; raises BadFile."""
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise BadFile(f"{path.name} is no safetensors file, or is cut off: {size} bytes, header of {length} announced.")
    if not 2 <= length <= LARGEST_HEADER:
        raise BadFile(f"{path.name} has a header of {length} bytes; 2 to {LARGEST_HEADER} are accepted.")
    data = strict_object(file.read(length), f"the header of {path.name}")
    metadata = _metadata(data.pop("__metadata__", {}), path)
    tensors = {name: _tensor(name, fields, 8 + length, path) for name, fields in data.items()}
    _check_layout(tensors, 8 + length, size, path)
    return Header(tensors, metadata)


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice")
    return found


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"it contains {name}")


def _metadata(found: object, path: Path) -> dict[str, str]:
    items = cast("dict[str, object]", found) if isinstance(found, dict) else {"": None}
    if not all(isinstance(value, str) for value in items.values()):
        raise BadFile(f"the metadata of {path.name} are not names with texts.")
    return cast("dict[str, str]", items)


def _tensor(name: str, found: object, base: int, path: Path) -> TensorInfo:
    fields = cast("dict[str, object]", found) if isinstance(found, dict) else {}
    dtype, shape, offsets = fields.get("dtype"), _counts(fields.get("shape")), _counts(fields.get("data_offsets"))
    if set(fields) != {"dtype", "shape", "data_offsets"} or shape is None or offsets is None or len(offsets) != 2:
        raise BadFile(f"{path.name} describes tensor {name[:200]!r} in a way that cannot be read.")
    if not isinstance(dtype, str) or dtype not in {*DTYPES, *_BITS}:
        raise BadFile(f"{path.name}: tensor {name[:200]!r} has the unknown type {str(dtype)[:40]!r}.")
    if len(shape) > MOST_DIMENSIONS:
        raise BadFile(
            f"{path.name}: tensor {name[:200]!r} has {len(shape)} dimensions; at most {MOST_DIMENSIONS} are read."
        )
    bits = math.prod(shape) * bits_of(dtype)
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise BadFile(
            f"{path.name}: tensor {name[:200]!r} of shape {list(shape)}, {dtype}, takes {bits / 8:.15g} bytes, "
            f"and its offsets leave {offsets[1] - offsets[0]}."
        )
    return TensorInfo(dtype, shape, base + offsets[0], base + offsets[1])


def bits_of(dtype: str) -> int:
    """Bits that a number of a type takes."""
    return _BITS.get(dtype) or 8 * DTYPES[dtype].itemsize


def _counts(found: object) -> tuple[int, ...] | None:
    items = cast("list[object]", found) if isinstance(found, list) else [None]
    good = all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 1 << 62 for item in items)
    return tuple(cast("Iterable[int]", items)) if good else None


def _check_layout(tensors: dict[str, TensorInfo], base: int, size: int, path: Path) -> None:
    """The tensors fill the file: none overlap, no bytes lie between them or after them."""
    place = base
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if info.start != place:
            what = "overlaps the one before it" if info.start < place else "leaves a gap before it"
            raise BadFile(f"{path.name}: tensor {name[:200]!r} {what}.")
        place = info.end
    if place != size:
        what = "is cut off" if place > size else "has bytes that belong to no tensor"
        raise BadFile(f"{path.name} {what}: its tensors end at byte {place}, the file at {size}.")
