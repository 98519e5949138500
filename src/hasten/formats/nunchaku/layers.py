"""Layers of nunchaku's files: SVDQuant in 4-bit integers or floats, and AWQ for the modulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hasten.formats.checks import expect
from hasten.formats.format import BadFile, Entry
from hasten.formats.fp4 import is_e2m1
from hasten.formats.mapped import TensorFile
from hasten.formats.nunchaku import packing
from hasten.formats.scaled import nvfp4_weight
from hasten.formats.tensors import coded
from hasten.kernels.modules import Input, LowRank
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.packing import pack, unpack
from hasten.kernels.weight import QuantizedWeight, Scales

SHIFT = 0.171875
"""What nunchaku adds to outputs of GELU, whose least value is its negative, before it rounds them to 0..15."""
HALF = ("BF16", "F16")


@dataclass(frozen=True)
class Spelling:
    """What a file calls smoothing and the two sides of the side branch."""

    smooth: str
    down: str
    up: str


FIRST = Spelling("smooth", "lora_down", "lora_up")
SECOND = Spelling("smooth_factor", "proj_down", "proj_up")


def spelling_of(file: TensorFile, base: str) -> Spelling:
    """The spelling that a layer has."""
    return SECOND if any(f"{base}.{key}" in file for key in ("smooth_factor", "proj_down")) else FIRST


def svdq_tensors(file: TensorFile, base: str) -> dict[str, str]:
    """Names of the tensors of an SVDQuant layer (but its bias), after a look at types and shapes."""
    spelled = spelling_of(file, base)
    rows, half = expect(file, f"{base}.qweight", ("I8", "U8"), (None, None)).shape
    columns = 2 * half
    if rows % packing.TILE or columns % packing.TILE or not rows or not columns:
        raise BadFile(f"{file.path.name}: '{base}.qweight' of {rows} x {columns} codes does not fill tiles of 128.")
    scales = file.info(f"{base}.wscales").dtype
    group = packing.MICRO if scales == "F8_E4M3" else packing.STEP
    expect(file, f"{base}.wscales", (*HALF, "F8_E4M3"), (columns // group, rows))
    shapes: dict[str, tuple[int | None, ...]] = {
        spelled.smooth: (columns,), f"{spelled.smooth}_orig": (columns,), "wcscales": (rows,),
        spelled.down: (columns, None), spelled.up: (rows, None),
    }  # fmt: skip
    found = {key: f"{base}.{key}" for key in ("qweight", "wscales", *shapes, "wtscale") if f"{base}.{key}" in file}
    for key in found.keys() & shapes.keys():
        expect(file, found[key], HALF, shapes[key])
    _check_ranks(file, base, spelled)
    return found


def _check_ranks(file: TensorFile, base: str, spelled: Spelling) -> None:
    ranks = [
        file.info(f"{base}.{key}").shape[1] if f"{base}.{key}" in file else 0 for key in (spelled.down, spelled.up)
    ]
    if ranks[0] != ranks[1] or ranks[0] % 16:
        raise BadFile(f"{file.path.name}: the side branch of {base!r} has {ranks[0]} and {ranks[1]} ranks.")


def read_svdq(file: TensorFile, names: Mapping[str, str]) -> Entry:
    """Undo the packing. 4-bit activations get 8 bits; the side branch sees the input as it is."""
    tensors = {key: file.tensor(name) for key, name in names.items()}
    codes = packing.unpack_weight(tensors["qweight"])
    floating = tensors["wscales"].dtype == torch.float8_e4m3fn
    weight, notes = _nvfp4(tensors, codes) if floating else _int4(tensors, codes)
    spelled = SECOND if "smooth_factor" in tensors or "proj_down" in tensors else FIRST
    if f"{spelled.smooth}_orig" in tensors:
        notes["smooth_orig"] = tensors[f"{spelled.smooth}_orig"]
    smooth = tensors.get(spelled.smooth)
    down, up = tensors.get(spelled.down), tensors.get(spelled.up)
    pair = None if down is None or up is None else LowRank(packing.unpack_down(down), packing.unpack_up(up))
    given = Input(smooth=None if smooth is None else packing.unpack_vector(smooth), activations="int8")
    return Entry(weight, given, None if pair is None or not pair.up.shape[1] else pair, notes)


def _int4(tensors: Mapping[str, torch.Tensor], codes: torch.Tensor) -> tuple[QuantizedWeight, dict[str, Any]]:
    scale = Scales(packing.unpack_scales(tensors["wscales"]))
    columns = 2 * codes.shape[1]
    # Two's complement in 4 bits is the shifted code with its highest bit flipped.
    return QuantizedWeight((codes.shape[0], columns), NUMBERS["int4"], columns, codes ^ 0x88, scale), {}


def _nvfp4(tensors: Mapping[str, torch.Tensor], codes: torch.Tensor) -> tuple[QuantizedWeight, dict[str, Any]]:
    """Scales of blocks, under one of each row (`wcscales`) times one of the tensor (`wtscale`)."""
    rows, whole = tensors.get("wcscales"), tensors.get("wtscale")
    coarse = torch.ones(1, 1) if whole is None else whole.float().reshape(1, 1)
    if rows is not None:
        coarse = coarse * packing.unpack_vector(rows).float().unsqueeze(1)
    notes: dict[str, Any] = {} if whole is None else {"wtscale": whole}
    notes |= {} if rows is None else {"wcscales": rows}
    return nvfp4_weight(codes, Scales(packing.unpack_micro_scales(tensors["wscales"]), coarse)), notes


def is_svdq(entry: Entry) -> bool:
    """Can nunchaku hold this entry as an SVDQuant layer?"""
    weight, given, pair = coded(entry), entry.given, entry.low_rank
    plain = weight.zero is None and weight.minimum is None and len(weight.shape) == 2
    full = plain and not any(size % packing.TILE for size in weight.shape) and weight.columns == weight.shape[1]
    turned = given.rotation == 1 and given.activations == "int8" and given.scale is None
    smooth = given.smooth is None or given.smooth.dtype in (torch.bfloat16, torch.float16)
    ranked = pair is None or (pair.up.shape[1] % 16 == 0 and pair.up.dtype == pair.down.dtype and _half(pair.up))
    return full and turned and smooth and ranked and (_is_int4(weight) or _is_nvfp4(entry))


def _half(tensor: torch.Tensor) -> bool:
    return tensor.dtype in (torch.bfloat16, torch.float16)


def _is_int4(weight: QuantizedWeight) -> bool:
    scale = weight.scale
    bare = scale.coarse is None and scale.table is None and scale.offset is None and _half(scale.codes)
    return (
        weight.number.name == "int4" and bare and scale.codes.shape == (weight.shape[0], weight.columns // packing.STEP)
    )


def _is_nvfp4(entry: Entry) -> bool:
    weight, scale = coded(entry), coded(entry).scale
    grid = (weight.shape[0], weight.columns // packing.MICRO)
    blocks = scale.codes.dtype == torch.float8_e4m3fn and scale.codes.shape == grid and scale.table is None
    return is_e2m1(weight) and blocks and scale.offset is None and _coarse_tensors(entry) is not None


def _coarse_tensors(entry: Entry) -> dict[str, torch.Tensor] | None:
    """`wtscale` and `wcscales` of an entry, as noted if they still give its scales; None if they cannot be had."""
    coarse, notes = coded(entry).scale.coarse, entry.notes
    noted = {key: notes[key] for key in ("wtscale", "wcscales") if key in notes}
    rows = packing.unpack_vector(noted["wcscales"]).float().unsqueeze(1) if "wcscales" in noted else torch.ones(1, 1)
    product = noted["wtscale"].float().reshape(1, 1) * rows if "wtscale" in noted else rows
    if coarse is None or torch.equal(coarse, product):
        return noted if coarse is not None else {}
    if coarse.numel() == 1:
        return {"wtscale": coarse.reshape(1)}
    narrow = coarse.to(torch.bfloat16)
    exact = torch.equal(narrow.float(), coarse.float()) and coarse.shape[1] == 1
    return {"wcscales": packing.pack_vector(narrow.reshape(-1))} if exact else None


def encode_svdq(entry: Entry, spelled: Spelling) -> dict[str, torch.Tensor]:
    """The tensors of a layer by the last part of their names. Without smoothing, ones are written."""
    weight, pair, smooth = coded(entry), entry.low_rank, entry.given.smooth
    floating = weight.number.kind == "table"
    codes = weight.codes if floating else weight.codes ^ 0x88
    scales = packing.pack_micro_scales(weight.scale.codes) if floating else packing.pack_scales(weight.scale.codes)
    found = {"qweight": packing.pack_weight(codes), "wscales": scales}
    found |= (_coarse_tensors(entry) or {}) if floating else {}
    dtype = torch.bfloat16 if floating else weight.scale.codes.dtype
    ones = torch.ones(weight.columns, dtype=dtype)
    found[spelled.smooth] = packing.pack_vector(ones if smooth is None else smooth)
    if "smooth_orig" in entry.notes:
        found[f"{spelled.smooth}_orig"] = entry.notes["smooth_orig"]
    if pair is not None:
        found |= {spelled.down: packing.pack_down(pair.down), spelled.up: packing.pack_up(pair.up)}
    return found


def shift_of_bias(entry: Entry) -> torch.Tensor:
    """What an input shifted by `SHIFT` adds to the outputs of the 4-bit part, float32 [outputs].

    nunchaku multiplies (x + shift) / smooth, and the bias in the file makes up for it; a bias for x itself is the
    stored one plus this.
    """
    weight, smooth = coded(entry), entry.given.smooth
    factor = SHIFT if smooth is None else SHIFT / smooth.double()
    tiles = weight.split([packing.TILE] * (weight.shape[0] // packing.TILE))
    return torch.cat([(tile.dequantize().double() * factor).sum(1) for tile in tiles]).float()


def awq_tensors(file: TensorFile, base: str) -> dict[str, str]:
    """Names of the tensors of an AWQ layer (but its bias), after a look at types and shapes."""
    quarter, half = expect(file, f"{base}.qweight", "I32", (None, None)).shape
    rows, columns = 4 * quarter, 2 * half
    if not rows or not columns or columns % packing.STEP:
        raise BadFile(f"{file.path.name}: '{base}.qweight' of {rows} x {columns} codes does not fill groups of 64.")
    for key in ("wscales", "wzeros"):
        info = expect(file, f"{base}.{key}", HALF, (None, rows))
        if info.shape[0] < columns // packing.STEP:
            raise BadFile(f"{file.path.name}: '{base}.{key}' has {info.shape[0]} groups for {columns} inputs.")
    return {key: f"{base}.{key}" for key in ("qweight", "wscales", "wzeros")}


def read_awq(file: TensorFile, names: Mapping[str, str], splits: int) -> Entry:
    """Undo the packing and the alternation of rows between the parts of a modulation."""
    tensors = {key: file.tensor(name) for key, name in names.items()}
    codes = packing.unpack_awq(tensors["qweight"])
    groups = codes.shape[1] // packing.STEP
    scale, zero = (tensors[key][:groups].t() for key in ("wscales", "wzeros"))
    rows = [packing.deinterleave(item.contiguous(), splits) for item in (codes, scale, -zero)]
    weight = QuantizedWeight(
        tuple(codes.shape), NUMBERS["uint4"], codes.shape[1], pack(rows[0], 4), Scales(rows[1]), Scales(rows[2])
    )
    return Entry(weight, notes={"groups": tensors["wscales"].shape[0], "splits": splits})


def is_awq(entry: Entry) -> bool:
    """Can nunchaku hold this entry as an AWQ layer: unsigned, in groups of 64, with a minimum for each?"""
    weight, low = coded(entry), coded(entry).minimum
    if entry.given != Input() or entry.low_rank is not None or weight.zero is not None or low is None:
        return False
    bare = all(
        s.coarse is None and s.table is None and s.offset is None and _half(s.codes) for s in (weight.scale, low)
    )
    grid = (weight.shape[0], weight.columns // packing.STEP)
    good = weight.number.name == "uint4" and len(weight.shape) == 2 and weight.columns == weight.shape[1]
    whole = not weight.columns % packing.STEP and not weight.shape[0] % 4
    return bare and good and whole and weight.scale.codes.shape == low.codes.shape == grid


def encode_awq(entry: Entry, splits: int) -> dict[str, torch.Tensor]:
    """The tensors of a layer by the last part of their names, groups filled up with zeros as they were."""
    weight = coded(entry)
    assert weight.minimum is not None
    codes = packing.interleave(unpack(weight.codes, 4, weight.columns), splits)
    rows = [packing.interleave(item, splits) for item in (weight.scale.codes, -weight.minimum.codes)]
    more = max(0, entry.notes.get("groups", 0) - weight.groups)
    scales, zeros = (torch.nn.functional.pad(item.t(), (0, 0, 0, more)) for item in rows)
    return {"qweight": packing.pack_awq(codes), "wscales": scales, "wzeros": zeros}
