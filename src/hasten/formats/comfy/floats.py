"""Layouts of layers in 8-bit and 4-bit floats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from hasten.formats.checks import FLOATS
from hasten.formats.comfy.layout import Layout, scale_of
from hasten.formats.format import Entry
from hasten.formats.fp4 import (
    MXFP8_BLOCK,
    NVFP4_BLOCK,
    quantize_mxfp8,
    quantize_nvfp4,
    swap_nibbles,
    tiled,
    untiled,
)
from hasten.formats.scaled import is_float8, is_nvfp4, nvfp4_weight, scale_grid
from hasten.formats.tensors import coded, stored_as
from hasten.kernels.modules import Input
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.rounding import quantize_float8
from hasten.kernels.weight import QuantizedWeight, Scales


class Float8(Layout):
    """8-bit floats under one scale; products in 8 bits where a scale of the input is there."""

    optional = {"weight_scale": FLOATS, "input_scale": FLOATS}

    def __init__(self, name: str, dtype: str) -> None:
        self.number = name
        self.needed = {"weight": (dtype,)}  # pyright: ignore[reportAttributeAccessIssue] # one for each type

    def read(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], notes: dict[str, Any]) -> Entry:
        """One scale, or one for each row."""
        codes, scale = tensors["weight"], tensors.get("weight_scale", torch.ones(()))
        inputs = tensors.get("input_scale")
        full = facts.get("full_precision_matrix_mult") is True
        weight = QuantizedWeight(
            tuple(codes.shape), NUMBERS[self.number], codes.shape[1], codes, Scales(scale_grid(scale, *codes.shape))
        )
        used = inputs is not None and not full
        given = Input(activations="float8" if used else "none", scale=None if inputs is None else inputs.reshape(()))
        shapes = {key: list(tensors[key].shape) for key in tensors if key != "weight"}
        return Entry(weight, given, notes=notes | {"shapes": shapes})

    def facts(self, entry: Entry) -> dict[str, Any] | None:
        """Rounded activations need a fixed scale."""
        if not is_float8(entry) or coded(entry).number.name != self.number or len(coded(entry).shape) != 2:
            return None
        noted = entry.notes.get("facts", {})
        used = entry.given.scale is not None and noted.get("full_precision_matrix_mult") is not True
        good = entry.given.activations == ("float8" if used else "none") and coded(entry).scale.codes.shape[1] == 1
        return {"format": self.number} if good else None

    def encode(self, entry: Entry) -> dict[str, torch.Tensor]:
        """A scalar scale, or [rows, 1]."""
        weight, inputs, notes = coded(entry), entry.given.scale, entry.notes
        scale = weight.scale.codes
        found = {"weight": weight.codes, "weight_scale": scale_of(scale, notes)}
        if "weight_scale" not in notes.get("shapes", {"weight_scale": None}):
            del found["weight_scale"]
        return found | ({} if inputs is None else {"input_scale": stored_as(inputs.reshape(()), notes, "input_scale")})

    def quantize(self, weight: torch.Tensor, options: Mapping[str, Any]) -> Entry:
        """One scale for all."""
        return Entry(quantize_float8(weight, self.number, block="tensor"))


class NVFP4(Layout):
    """e2m1 in blocks of 16, the even input in the high half of a byte; block scales in tiles of 128 x 4."""

    needed = {"weight": ("U8",), "weight_scale": ("F8_E4M3",), "weight_scale_2": ("F32",)}
    optional = {"input_scale": ("F32",), "pre_quant_scale": FLOATS}
    halves = "U8"

    def read(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], notes: dict[str, Any]) -> Entry:
        """The fixed scale of 4-bit inputs is of no use for 8 bits, which take its place, and is noted."""
        codes, whole = tensors["weight"], tensors["weight_scale_2"]
        blocks = untiled(tensors["weight_scale"], codes.shape[0], 2 * codes.shape[1] // NVFP4_BLOCK)
        weight = nvfp4_weight(swap_nibbles(codes), Scales(blocks, whole.reshape(1, 1)))
        kept: dict[str, Any] = {"shapes": {"weight_scale_2": list(whole.shape)}}
        kept |= {key: tensors[key] for key in self.optional if key in tensors}
        inputs, factor = tensors.get("input_scale"), tensors.get("pre_quant_scale")
        given = Input(
            smooth=None if factor is None else 1 / factor.double(), activations="none" if inputs is None else "int8"
        )
        return Entry(weight, given, notes=notes | kept)

    def facts(self, entry: Entry) -> dict[str, Any] | None:
        """Smoothing is written as the factor it was read from."""
        factor, smooth = entry.notes.get("pre_quant_scale"), entry.given.smooth
        if (factor is None) != (smooth is None):
            return None
        if factor is not None and smooth is not None and not torch.equal(1 / factor.double(), smooth):
            return None
        bare = replace(entry, given=replace(entry.given, smooth=None))
        return {"format": "nvfp4"} if is_nvfp4(bare) else None

    def encode(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Tiled scales and swapped halves."""
        weight = coded(entry)
        assert weight.scale.coarse is not None
        whole = stored_as(weight.scale.coarse.reshape(()), entry.notes, "weight_scale_2")
        found = {"weight": swap_nibbles(weight.codes), "weight_scale": tiled(weight.scale.codes)}
        found |= {"weight_scale_2": whole}
        return found | {key: entry.notes[key] for key in self.optional if key in entry.notes}

    def quantize(self, weight: torch.Tensor, options: Mapping[str, Any]) -> Entry:
        """Rounding to nearest."""
        return Entry(quantize_nvfp4(weight))


class MXFP8(Layout):
    """e4m3 in blocks of 32 with scales that are powers of two, in tiles of 128 x 4."""

    needed = {"weight": ("F8_E4M3",), "weight_scale": ("F8_E8M0", "U8")}

    def read(self, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any], notes: dict[str, Any]) -> Entry:
        """Scales may be bytes by type."""
        codes, scale = tensors["weight"], tensors["weight_scale"]
        plain = untiled(scale.view(torch.float8_e8m0fnu), codes.shape[0], codes.shape[1] // MXFP8_BLOCK)
        weight = QuantizedWeight(
            tuple(codes.shape), NUMBERS["float8_e4m3fn"], codes.shape[1], codes, Scales(plain)
        )  # fmt: skip
        return Entry(weight, Input(activations="float8"), notes=notes | {"bytes": scale.dtype == torch.uint8})

    def facts(self, entry: Entry) -> dict[str, Any] | None:
        """Blocks of 32 with e8m0 scales."""
        weight, scale = coded(entry), coded(entry).scale
        plain = weight.minimum is None and weight.zero is None and entry.low_rank is None and scale.coarse is None
        given = entry.given == Input(activations="float8")
        blocks = scale.codes.dtype == torch.float8_e8m0fnu and weight.columns == weight.shape[-1]
        grid = scale.codes.shape == (weight.shape[0], weight.columns // MXFP8_BLOCK)
        good = weight.number.name == "float8_e4m3fn" and plain and given and blocks and grid and len(weight.shape) == 2
        return {"format": "mxfp8"} if good else None

    def encode(self, entry: Entry) -> dict[str, torch.Tensor]:
        """Tiled scales."""
        scale = tiled(coded(entry).scale.codes)
        scale = scale.view(torch.uint8) if entry.notes.get("bytes") else scale
        return {"weight": coded(entry).codes, "weight_scale": scale}

    def quantize(self, weight: torch.Tensor, options: Mapping[str, Any]) -> Entry:
        """Scales rounded up, so that nothing overflows."""
        return Entry(quantize_mxfp8(weight), Input(activations="float8"))
