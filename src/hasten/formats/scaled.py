"""Layers of 8-bit and 4-bit floats with their scales beside them: what fp8_scaled, BFL's and ModelOpt's files share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from hasten.formats.checks import FLOATS, expect
from hasten.formats.format import BadFile, Entry
from hasten.formats.fp4 import E2M1, NVFP4_BLOCK, is_e2m1
from hasten.formats.mapped import TensorFile
from hasten.formats.tensors import Part, TensorFormat, base_of, coded, stored_as
from hasten.kernels.modules import Input
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.weight import QuantizedWeight, Scales

FLOAT8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
WEIGHT_SCALES = ("weight_scale", "scale_weight")
INPUT_SCALES = ("input_scale", "scale_input")
_SCALE_TYPES = (*FLOATS, "F64")


class Scaled(TensorFormat):
    """Base of the formats: `<layer>.weight` in 8-bit floats or NVFP4, with `<layer>.weight_scale` and others."""

    companions: ClassVar[int] = 4
    spelling: ClassVar[tuple[str, str]] = (WEIGHT_SCALES[0], INPUT_SCALES[0])
    """Names of the scales of weight and input in new files; both spellings are read."""
    rounds: ClassVar[bool] = False
    """Are activations rounded token by token where the file has no scale for them?"""

    def parts(self, file: TensorFile) -> Mapping[str, Part]:
        """One for each weight that has a scale."""
        found: dict[str, Part] = {}
        for name in file.names():
            base, _, key = name.rpartition(".")
            if key in WEIGHT_SCALES and (part := self.part(file, base, key)) is not None:
                found[f"{base}.weight"] = part
        return found

    def part(self, file: TensorFile, base: str, key: str) -> Part | None:
        """The entry of a layer; None for a scale without an 8-bit or 4-bit weight."""
        weight = f"{base}.weight"
        dtype = file.info(weight).dtype if weight in file else None
        if dtype in FLOAT8:
            return self.float8_part(file, base, key)
        return nvfp4_part(file, base) if dtype == "U8" and f"{base}.weight_scale_2" in file else None

    def float8_part(self, file: TensorFile, base: str, key: str) -> Part:
        """A weight in 8-bit floats with one scale, or one for each row or block."""
        info = expect(file, f"{base}.weight", tuple(FLOAT8))
        if len(info.shape) < 2:
            raise BadFile(f"{file.path.name}: '{base}.weight' has a scale and is no matrix.")
        names = {"weight": f"{base}.weight", key: f"{base}.{key}"}
        names |= {item: f"{base}.{item}" for item in INPUT_SCALES if f"{base}.{item}" in file}
        for item in names.keys() - {"weight"}:
            expect(file, names[item], _SCALE_TYPES)
        return Part(info.shape, tuple(names.values()), lambda: self.read_float8(file, names, key))

    def read_float8(self, file: TensorFile, names: Mapping[str, str], key: str) -> Entry:
        """Put such a layer together. Empty scales stand for none; their names and all shapes are noted."""
        tensors = {item: file.tensor(name) for item, name in names.items()}
        codes = tensors.pop("weight")
        rows = codes.shape[0]
        grid = scale_grid(tensors[key], rows, codes[0].numel())
        number = NUMBERS[str(codes.dtype).removeprefix("torch.")]
        flat = codes.reshape(rows, -1)
        weight = QuantizedWeight(tuple(codes.shape), number, flat.shape[1], flat, Scales(grid))
        inputs = next((item for item in INPUT_SCALES if item in tensors), None)
        return Entry(weight, self.given(tensors, inputs), notes=_notes(tensors, key, inputs))

    def given(self, tensors: Mapping[str, torch.Tensor], key: str | None) -> Input:
        """What is done to the input: rounded with a fixed scale, if there is one."""
        if key is None or not tensors[key].numel():
            return Input(activations="float8" if self.rounds else "none")
        return Input(activations="float8", scale=tensors[key].reshape(()))

    def encodes(self, entry: Entry) -> bool:
        """Weights in 8-bit floats or NVFP4, as the format would read them."""
        if is_nvfp4(entry):
            return self.holds_nvfp4
        return is_float8(entry) and self.fits(entry)

    holds_nvfp4: ClassVar[bool] = True

    def fits(self, entry: Entry) -> bool:
        """Is the rounding of activations the one that reading the file again gives?"""
        rounded = entry.given.scale is not None or self.rounds
        return entry.given.activations == ("float8" if rounded else "none")

    def encode(self, name: str, entry: Entry) -> Mapping[str, torch.Tensor]:
        """The tensors of a layer."""
        base = base_of(name)
        tensors = nvfp4_tensors(entry) if is_nvfp4(entry) else self.float8_tensors(entry)
        return {f"{base}.{key}": tensor for key, tensor in tensors.items()}

    def float8_tensors(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Weight and scales by the last part of their names, empty ones included."""
        weight, notes, given = coded(entry), entry.notes, entry.given
        names = notes.get("names", self.spelling)
        empty = notes.get("empty", ())
        found = {"weight": weight.codes.reshape(weight.shape)}
        scale = weight.scale.codes
        found[names[0]] = scale.new_empty(0) if names[0] in empty else self.scale_tensor(scale, notes)
        if given.scale is not None:
            found[names[1]] = stored_as(given.scale.reshape(()), notes, "input")
        elif names[1] in empty:
            found[names[1]] = scale.new_empty(0)
        return found

    def scale_tensor(self, scale: torch.Tensor, notes: Mapping[str, Any]) -> torch.Tensor:
        """The scale in the shape of the file: a scalar, or one for each row (or block)."""
        shape = notes.get("shapes", {}).get("weight")
        if shape is not None and len(shape) == 2 and scale.shape[0] % shape[0] == 0 and scale.shape[1] == shape[1]:
            return scale[:: scale.shape[0] // shape[0]]
        return stored_as(scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1), notes, "weight")


def scale_grid(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A scale of the tensor, of each row, or of each block, as [1 or rows, groups]; 1 for an empty one."""
    if not scale.numel():
        return torch.ones(1, 1, dtype=scale.dtype)
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.numel() == rows and (scale.ndim == 1 or scale.shape[0] == rows):
        return scale.reshape(rows, 1)
    if scale.ndim != 2 or rows % scale.shape[0] or columns % scale.shape[1]:
        raise BadFile(f"a scale of shape {list(scale.shape)} does not divide a weight of {rows} x {columns}.")
    return scale.repeat_interleave(rows // scale.shape[0], 0)


def _notes(tensors: Mapping[str, torch.Tensor], key: str, inputs: str | None) -> dict[str, Any]:
    """Spelling, shapes, and which scales are empty."""
    other = inputs or INPUT_SCALES[WEIGHT_SCALES.index(key)]
    shapes = {"weight": list(tensors[key].shape)} | ({"input": list(tensors[inputs].shape)} if inputs else {})
    empty = [item for item, tensor in tensors.items() if not tensor.numel()]
    return {"names": [key, other], "shapes": shapes} | ({"empty": empty} if empty else {})


def is_float8(entry: Entry) -> bool:
    """Is it 8-bit floats with plain scales, in the layer's own grid, and nothing else?"""
    weight = coded(entry)
    plain = weight.zero is None and weight.minimum is None and entry.low_rank is None
    scale = weight.scale
    bare = scale.coarse is None and scale.table is None and scale.offset is None
    still = entry.given.smooth is None and entry.given.rotation == 1
    matrix = weight.codes.shape[0] == weight.shape[0]
    wide = scale.codes.is_floating_point() and scale.codes.element_size() > 1
    few = scale.codes.shape[1] == 1 or "shapes" in entry.notes
    return weight.number.kind == "float" and plain and bare and still and matrix and wide and few


def nvfp4_part(file: TensorFile, base: str) -> Part:
    """A weight in 4-bit floats: codes (even inputs in the low halves), scales of blocks, and the scale of these."""
    names = {key: f"{base}.{key}" for key in ("weight", "weight_scale", "weight_scale_2")}
    rows, half = expect(file, names["weight"], "U8", (None, None)).shape
    expect(file, names["weight_scale"], "F8_E4M3", (rows, 2 * half // NVFP4_BLOCK))
    if "input_scale" in (extra := {k: f"{base}.{k}" for k in ("input_scale",) if f"{base}.{k}" in file}):
        expect(file, extra["input_scale"], "F32")
    if expect(file, names["weight_scale_2"], "F32").shape not in ((), (1,)):
        raise BadFile(f"{file.path.name}: {names['weight_scale_2']!r} is not one number.")
    return Part((rows, 2 * half), (*names.values(), *extra.values()), lambda: _read_nvfp4(file, names | extra))


def _read_nvfp4(file: TensorFile, names: Mapping[str, str]) -> Entry:
    tensors = {key: file.tensor(name) for key, name in names.items()}
    whole, codes = tensors["weight_scale_2"], tensors["weight"]
    scale = Scales(tensors["weight_scale"], whole.reshape(1, 1))
    weight = nvfp4_weight(codes, scale)
    notes: dict[str, Any] = {"shapes": {"whole": list(whole.shape)}}
    if "input_scale" not in tensors:
        return Entry(weight, notes=notes)
    # The scale is one for 4-bit inputs, of no use for 8 bits, which take its place.
    return Entry(weight, Input(activations="int8"), notes=notes | {"input_scale": tensors["input_scale"]})


def nvfp4_weight(codes: torch.Tensor, scale: Scales) -> QuantizedWeight:
    """From packed codes, [rows, columns / 2], and scales, [rows, columns / 16]."""
    columns = 2 * codes.shape[1]
    return QuantizedWeight(
        (codes.shape[0], columns), NUMBERS["table4"], columns, codes, scale, table=E2M1.clone()
    )  # fmt: skip


def is_nvfp4(entry: Entry) -> bool:
    """Is it 4-bit floats in blocks of 16 with e4m3 scales under one float32 scale, and nothing else?"""
    weight, given = coded(entry), entry.given
    scale = weight.scale
    plain = weight.zero is None and weight.minimum is None and entry.low_rank is None and len(weight.shape) == 2
    whole = scale.coarse is not None and scale.coarse.numel() == 1 and scale.coarse.dtype == torch.float32
    blocks = scale.codes.dtype == torch.float8_e4m3fn and scale.table is None and scale.offset is None
    grid = scale.codes.shape == (weight.shape[0], weight.shape[-1] // NVFP4_BLOCK)
    rounded = given.activations == ("int8" if "input_scale" in entry.notes else "none")
    still = given.smooth is None and given.rotation == 1 and given.scale is None
    return plain and whole and blocks and grid and rounded and still and is_e2m1(weight)


def nvfp4_tensors(entry: Entry) -> dict[str, torch.Tensor]:
    """The tensors of such a layer by the last part of their names."""
    weight, notes = coded(entry), entry.notes
    assert weight.scale.coarse is not None
    whole = stored_as(weight.scale.coarse.reshape(()), notes, "whole")
    found = {"weight": weight.codes, "weight_scale": weight.scale.codes, "weight_scale_2": whole}
    return found | ({"input_scale": notes["input_scale"]} if "input_scale" in notes else {})
