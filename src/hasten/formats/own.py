"""hasten's own layout: everything that a quantized layer needs, under the names that its buffers have.

A layer `blocks.0.proj` has the tensors `blocks.0.proj.codes`, `.scale` and, where there are such, `.scale_coarse`,
`.zero`, `.smooth`, `.down`, `.up` and others (see `kernels.modules.Quantized`): what its module's state_dict holds.
What these tensors mean is in the file's metadata under `hasten`: JSON with `version` and `layers`, which has for each
weight what `Quantized.describe` gives. Reading it executes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch

from hasten.formats.format import BadFile, Entry
from hasten.formats.header import strict_object
from hasten.formats.mapped import TensorFile
from hasten.formats.tensors import Closing, Part, TensorFormat, base_of, chosen, coded, is_linear
from hasten.kernels.modules import Input, LowRank
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.rounding import quantize_float8, quantize_integer
from hasten.kernels.weight import TENSORS, QuantizedWeight

VERSION = 1
_COMPUTE = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SIDE = ("smooth", "input_scale", "down", "up")


class Own(TensorFormat):
    """Holds any entry without loss: codes of every kind, smoothing, rotation, rounding of activations, side branch."""

    name: ClassVar[str] = "hasten"
    kinds: ClassVar[tuple[str, ...]] = ("int8", "int4", "float8")
    companions: ClassVar[int] = 6
    holds_computation: ClassVar[bool] = True

    def claims(self, file: TensorFile) -> bool:
        """Files with a description under `hasten` in their metadata."""
        return "hasten" in file.metadata

    def parts(self, file: TensorFile) -> Mapping[str, Part]:
        """One for each layer that the metadata describe."""
        found = strict_object(file.metadata.get("hasten", "null"), f"the description in {file.path.name}")
        layers, version = found.get("layers"), found.get("version")
        if version != VERSION or not isinstance(layers, dict):
            raise BadFile(f"{file.path.name} has layout version {version!r}; this version of hasten reads {VERSION}.")
        return {name: _part(file, name, facts) for name, facts in cast("dict[str, object]", layers).items()}

    def encodes(self, entry: Entry) -> bool:
        """Any."""
        return True

    def encode(self, name: str, entry: Entry) -> Mapping[str, torch.Tensor]:
        """The tensors by the names of the module's buffers."""
        given, pair = entry.given, entry.low_rank
        side = {"smooth": given.smooth, "input_scale": given.scale}
        side |= {"down": pair.down, "up": pair.up} if pair else {}
        tensors = coded(entry).tensors() | {key: tensor for key, tensor in side.items() if tensor is not None}
        return {f"{base_of(name)}.{key}": tensor for key, tensor in tensors.items()}

    def describe(self, entry: Entry) -> dict[str, Any]:
        """What is written about an entry into the metadata."""
        weight, given = coded(entry), entry.given
        facts: dict[str, Any] = {"shape": list(weight.shape), "number": weight.number.name, "columns": weight.columns}
        facts |= {"rotation": given.rotation, "activations": given.activations, "threshold": given.threshold}
        facts["compute"] = given.compute and str(given.compute).removeprefix("torch.")
        notes = {key: value for key, value in entry.notes.items() if _is_json(value)}
        return facts | ({"notes": notes} if notes else {})

    def closing(self, entries: Mapping[str, Mapping[str, Any]], plain: Sequence[str]) -> Closing:
        """The description of all layers."""
        text = json.dumps({"version": VERSION, "layers": dict(entries)}, separators=(",", ":"))
        return {}, {"hasten": text}

    def noted(self, entry: Entry) -> Mapping[str, Any]:
        """The description instead of the notes."""
        return self.describe(entry)

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """By row (int8, float8) or in groups of 64 with zero points (int4)."""
        if not is_linear(name, weight):
            return Entry(weight)
        if chosen(kind, self) == "int8":
            return Entry(quantize_integer(weight, 8), Input(activations="int8"))
        if kind == "float8":
            return Entry(quantize_float8(weight), Input(activations="float8"))
        return Entry(quantize_integer(weight, 4, 64, symmetric=False, scales=torch.float16))


def _part(file: TensorFile, name: str, facts: object) -> Part:
    fields = cast("dict[str, object]", facts) if isinstance(facts, dict) else {}
    number, shape = fields.get("number"), _sizes(fields.get("shape"))
    columns, rotation = _sizes([fields.get("columns")]), _sizes([fields.get("rotation")])
    activations = fields.get("activations")
    threshold, compute = fields.get("threshold", 0.0), fields.get("compute")
    good = isinstance(number, str) and number in NUMBERS and isinstance(activations, str)
    good = good and isinstance(threshold, float | int) and threshold >= 0 and compute in (None, *_COMPUTE)
    if not (good and shape and columns and rotation):
        raise BadFile(f"{file.path.name} describes {name[:200]!r} in a way that cannot be read.")
    base = base_of(name)
    tensors = {key: f"{base}.{key}" for key in (*TENSORS, *_SIDE) if f"{base}.{key}" in file}
    if not {"codes", "scale"} <= tensors.keys() or ("down" in tensors) != ("up" in tensors):
        raise BadFile(
            f"{file.path.name} describes {name[:200]!r} and lacks its codes, its scales, or a side of its branch."
        )
    return Part(shape, tuple(tensors.values()), lambda: _read(file, tensors, shape, columns[0], rotation[0], fields))


def _read(
    file: TensorFile, names: dict[str, str], shape: tuple[int, ...], columns: int, rotation: int, facts: dict[str, Any]
) -> Entry:
    tensors = {key: file.tensor(name) for key, name in names.items()}
    weight = QuantizedWeight.of(shape, facts["number"], columns, tensors)
    given = Input(
        tensors.get("smooth"), rotation, facts["activations"], tensors.get("input_scale"),
        facts.get("threshold", 0.0), _COMPUTE.get(facts.get("compute", "")),
    )  # fmt: skip
    pair = LowRank(tensors["down"], tensors["up"]) if "down" in tensors else None
    notes = facts.get("notes")
    return Entry(weight, given, pair, cast("dict[str, Any]", notes) if isinstance(notes, dict) else {})


def _sizes(found: object) -> tuple[int, ...] | None:
    items = cast("list[object]", found) if isinstance(found, list) else [None]
    good = all(isinstance(item, int) and not isinstance(item, bool) and 0 < item < 1 << 40 for item in items)
    return tuple(cast("list[int]", items)) if good and 0 < len(items) <= 8 else None


def _is_json(value: object) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True
