"""Layouts of layers in integers of 8 and 4 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from hasten.formats.checks import FLOATS
from hasten.formats.comfy.layout import Layout, scale_of
from hasten.formats.format import BadFile, Entry
from hasten.formats.mapped import TensorFile
from hasten.formats.scaled import scale_grid
from hasten.formats.tensors import coded, stored_as
from hasten.kernels.hadamard import rotate, rotation_group
from hasten.kernels.modules import Input
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.packing import unpack
from hasten.kernels.rounding import quantize_integer
from hasten.kernels.weight import QuantizedWeight, Scales, spread

GROUP = 256
"""Channels that files rotate together unless they say otherwise."""


class Integer(Layout):
    """8-bit integers under one scale or one for each row; with `convrot` for rotated inputs. Activations in 8 bits."""

    needed = {"weight": ("I8",), "weight_scale": FLOATS}

    def read(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], notes: dict[str, Any]) -> Entry:
        """Rotation is part of the description."""
        codes, scale = tensors["weight"], tensors["weight_scale"]
        turn = _count(facts, "convrot_groupsize", GROUP) if facts.get("convrot") is True else 1
        weight = QuantizedWeight(
            tuple(codes.shape), NUMBERS["int8"], codes.shape[1], codes, Scales(scale_grid(scale, *codes.shape))
        )
        return Entry(
            weight, Input(rotation=turn, activations="int8"),
            notes=notes | {"shapes": {"weight_scale": list(scale.shape)}},
        )  # fmt: skip

    def facts(self, entry: Entry) -> dict[str, Any] | None:
        """Rotations by powers of four are known to these files."""
        if not _integers(entry, "int8") or not _turns(entry.given.rotation):
            return None
        turn = entry.given.rotation
        return {"format": "int8_tensorwise"} | ({} if turn == 1 else {"convrot": True, "convrot_groupsize": turn})

    def encode(self, entry: Entry) -> dict[str, torch.Tensor]:
        """A scalar scale, or [rows, 1]."""
        scale = scale_of(coded(entry).scale.codes, entry.notes)
        return {"weight": coded(entry).codes, "weight_scale": scale}

    def quantize(self, weight: torch.Tensor, options: Mapping[str, Any]) -> Entry:
        """Row by row, after rotation if that is asked for and the inputs can be grouped."""
        turn = _turn(weight.shape[1]) if options.get("convrot") else 1
        inner = weight.float() if turn == 1 else rotate(weight.float(), turn)
        return Entry(quantize_integer(inner, 8), Input(rotation=turn, activations="int8"))


class ConvRotW4A4(Layout):
    """Signed 4-bit integers by row for rotated inputs, the even input in the low half of a byte."""

    needed = {"weight": ("I8",), "weight_scale": ("F32",)}
    halves = "I8"

    def read(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], notes: dict[str, Any]) -> Entry:
        """Activations get 8 bits instead of 4."""
        raw, scale = tensors["weight"].view(torch.uint8), tensors["weight_scale"]
        columns = 2 * raw.shape[1]
        # Two's complement in 4 bits is the shifted code with its highest bit flipped.
        grid = Scales(scale_grid(scale, raw.shape[0], columns))
        weight = QuantizedWeight((raw.shape[0], columns), NUMBERS["int4"], columns, raw ^ 0x88, grid)
        given = Input(rotation=_count(facts, "convrot_groupsize", GROUP), activations="int8")
        return Entry(weight, given, notes=notes | {"shapes": {"weight_scale": list(scale.shape)}})

    def facts(self, entry: Entry) -> dict[str, Any] | None:
        """Always rotated."""
        turn = entry.given.rotation
        if not _integers(entry, "int4") or turn == 1 or not _turns(turn) or coded(entry).shape[1] % 64:
            return None
        return {"format": "convrot_w4a4", "convrot_groupsize": turn, "quant_group_size": 64}

    def encode(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Scales [rows]."""
        weight = coded(entry)
        scale = stored_as(weight.scale.codes.reshape(-1), entry.notes, "weight_scale")
        return {"weight": (weight.codes ^ 0x88).view(torch.int8), "weight_scale": scale}

    def quantize(self, weight: torch.Tensor, options: Mapping[str, Any]) -> Entry:
        """Row by row after rotation."""
        turn = _turn(weight.shape[1])
        if turn == 1 or weight.shape[1] % 64:
            return Entry(weight)
        return Entry(quantize_integer(rotate(weight.float(), turn), 4), Input(rotation=turn, activations="int8"))


class W4A8(Layout):
    """Indices into a table, scaled by group and rounded to 8 bits, then scaled by row; for rotated inputs."""

    needed = {"weight": ("I8",), "weight_s_rel": ("F8_E4M3", "F32"), "weight_s_channel": ("F32",)}
    optional = {"weight_correction": FLOATS, "weight_codebook": ("F32",)}
    halves = "I8"

    def read(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], notes: dict[str, Any]) -> Entry:
        """The 8-bit integers that the layout decodes to, and the correction of each group, if there is one."""
        raw, relative = tensors["weight"].view(torch.uint8), tensors["weight_s_rel"].float()
        rows, columns = raw.shape[0], 2 * raw.shape[1]
        table = tensors.get("weight_codebook", torch.arange(16.0) - 8)
        if table.shape != (16,) or relative.shape[0] != rows or columns % relative.shape[1]:
            raise BadFile("the table or the scales of a layer in asym_w4a8_int8 have the wrong size.")
        levels = table.float()[unpack(raw, 4, columns).int()] * spread(relative, columns)
        codes = levels.round().clamp(-127, 127).to(torch.int8)
        correction = tensors.get("weight_correction")
        minimum = None if correction is None else Scales(-correction.t())
        scale = Scales(tensors["weight_s_channel"].reshape(rows, 1))
        weight = QuantizedWeight((rows, columns), NUMBERS["int8"], columns, codes, scale, minimum)
        given = Input(rotation=_count(facts, "convrot_groupsize", GROUP), activations="int8")
        return Entry(weight, given)

    def facts(self, entry: Entry) -> dict[str, Any] | None:
        """Never written."""
        return None


class AWQ(Layout):
    """Unsigned 4-bit integers in groups: (code - 8) * scale + zero; scales and zeros [groups, rows]."""

    needed = {"weight": ("I8", "U8"), "weight_scale": FLOATS, "weight_zeros": FLOATS}

    def shape(self, file: TensorFile, base: str) -> tuple[int, ...]:
        """Two codes share a byte, whatever its type."""
        rows, half = file.info(f"{base}.weight").shape
        return rows, 2 * half

    def read(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], notes: dict[str, Any]) -> Entry:
        """The zero is added: it becomes a negative minimum."""
        codes, scale, zeros = tensors["weight"], tensors["weight_scale"], tensors["weight_zeros"]
        rows, columns = codes.shape[0], 2 * codes.shape[1]
        weight = QuantizedWeight(
            (rows, columns), NUMBERS["uint4"], columns, codes.view(torch.uint8), Scales(scale.t().contiguous()),
            Scales(-zeros.t().contiguous()), torch.full((1, 1), 8, dtype=torch.uint8),
        )  # fmt: skip
        return Entry(weight, notes=notes | {"signed": codes.dtype == torch.int8})

    def facts(self, entry: Entry) -> dict[str, Any] | None:
        """Plain scales and minima for each row and group, and the zero 8."""
        weight = coded(entry)
        number = weight.number.name == "uint4" and len(weight.shape) == 2 and weight.columns == weight.shape[1]
        if not number or entry.given != Input() or entry.low_rank is not None or weight.minimum is None:
            return None
        eight = weight.zero is not None and bool((weight.zero == 8).all())
        plain = all(s.coarse is None and s.table is None and s.offset is None for s in (weight.scale, weight.minimum))
        same = weight.scale.codes.shape == weight.minimum.codes.shape and weight.scale.codes.shape[0] == weight.shape[0]
        good = eight and plain and same and weight.scale.codes.element_size() > 1
        return {"format": "awq_w4a16", "group_size": weight.columns // weight.groups} if good else None

    def encode(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Back to [groups, rows]."""
        weight = coded(entry)
        assert weight.minimum is not None
        codes = weight.codes.view(torch.int8) if entry.notes.get("signed", True) else weight.codes
        return {
            "weight": codes, "weight_scale": weight.scale.codes.t(), "weight_zeros": -weight.minimum.codes.t()
        }  # fmt: skip


def _count(facts: Mapping[str, Any], key: str, default: int) -> int:
    found = facts.get(key, default)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise BadFile(f"a layer describes its {key} as {str(found)[:40]!r}.")
    return found


def _integers(entry: Entry, number: str) -> bool:
    """Is it symmetric integers with a scale for each row or one, in the layer's grid, for activations in 8 bits?"""
    weight, given, scale = coded(entry), entry.given, coded(entry).scale
    bare = scale.coarse is None and scale.table is None and scale.offset is None and scale.codes.is_floating_point()
    plain = weight.zero is None and weight.minimum is None and entry.low_rank is None and given.smooth is None
    few = scale.codes.shape[1] == 1 and scale.codes.dtype == torch.float32
    grid = weight.columns == weight.shape[-1] and len(weight.shape) == 2
    active = given.activations == "int8" and given.scale is None
    return weight.number.name == number and bare and plain and few and grid and active


def _turns(group: int) -> bool:
    """Is it 1 or a power of four?"""
    return group & (group - 1) == 0 and group.bit_length() % 2 == 1


def _turn(columns: int) -> int:
    """The largest power of four up to 256 that divides the inputs."""
    group = rotation_group(columns, GROUP)
    return group if _turns(group) else group // 2
