"""ComfyUI's newer quantized files: each layer says by itself, in JSON, how it is stored.

The JSON is a uint8 tensor `<layer>.comfy_quant`, or stands for all layers in the metadata `_quantization_metadata`.
Facts: https://github.com/Comfy-Org/comfy-kitchen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch

from hasten.formats.comfy.floats import MXFP8, NVFP4, Float8
from hasten.formats.comfy.integers import AWQ, W4A8, ConvRotW4A4, Integer
from hasten.formats.comfy.layout import Layout
from hasten.formats.format import BadFile, Entry
from hasten.formats.header import strict_object
from hasten.formats.mapped import TensorFile
from hasten.formats.streamed import bytes_of
from hasten.formats.tensors import Closing, Part, TensorFormat, base_of, chosen, is_linear

TENSOR = "comfy_quant"
METADATA = "_quantization_metadata"
_LARGEST = 1 << 16


LAYOUTS: dict[str, Layout] = {
    "float8_e4m3fn": Float8("float8_e4m3fn", "F8_E4M3"),
    "float8_e5m2": Float8("float8_e5m2", "F8_E5M2"),
    "nvfp4": NVFP4(),
    "mxfp8": MXFP8(),
    "int8_tensorwise": Integer(),
    "convrot_w4a4": ConvRotW4A4(),
    "asym_w4a8_int8": W4A8(),
    "awq_w4a16": AWQ(),
}
"""All layouts by the name that files use."""


class ComfyQuant(TensorFormat):
    """8-bit floats, NVFP4, MXFP8, 8-bit integers (also rotated), and 4-bit weights for 8-bit, 4-bit or 16-bit products.

    4-bit activations are computed with 8 bits. `asym_w4a8_int8` decodes through a rounding to 8 bits that no scale can
    express: it is read as those 8-bit integers, exactly, and not written.
    """

    name: ClassVar[str] = "comfy_quant"
    kinds: ClassVar[tuple[str, ...]] = (
        "float8_e4m3fn", "float8_e5m2", "int8_tensorwise", "int8_convrot", "nvfp4", "mxfp8", "convrot_w4a4",
    )  # fmt: skip
    companions: ClassVar[int] = 5

    def claims(self, file: TensorFile) -> bool:
        """Files in which a layer, or the metadata, describe themselves."""
        return METADATA in file.metadata or any(name.endswith(f".{TENSOR}") for name in file.names())

    def parts(self, file: TensorFile) -> Mapping[str, Part]:
        """One for each layer that is described."""
        found: dict[str, Part] = {}
        for base, (facts, notes) in (_in_metadata(file) | _in_tensors(file)).items():
            found[f"{base}.weight"] = _part(file, base, facts, notes)
        return found

    def encodes(self, entry: Entry) -> bool:
        """What one of the layouts can hold."""
        return _layout(entry) is not None

    def encode(self, name: str, entry: Entry) -> Mapping[str, torch.Tensor]:
        """The tensors of a layer, and its description unless that stood in the metadata."""
        found = _layout(entry)
        assert found is not None
        layout, facts = found
        base = base_of(name)
        tensors = {f"{base}.{key}": tensor for key, tensor in layout.encode(entry).items()}
        if entry.notes.get("in_metadata"):
            return tensors
        text = entry.notes.get("text", json.dumps(facts)).encode()
        return tensors | {f"{base}.{TENSOR}": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    def closing(self, entries: Mapping[str, Mapping[str, Any]], plain: Sequence[str]) -> Closing:
        """The description of the layers that were described there."""
        layers = {base_of(name): notes["facts"] for name, notes in entries.items() if notes.get("in_metadata")}
        return {}, {METADATA: json.dumps({"format_version": "1.0", "layers": layers})} if layers else {}

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """Round matrices; what is no such matrix stays plain."""
        layout, options = _KINDS[chosen(kind, self)]
        return LAYOUTS[layout].quantize(weight, options) if is_linear(name, weight) else Entry(weight)


_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "float8_e4m3fn": ("float8_e4m3fn", {}),
    "float8_e5m2": ("float8_e5m2", {}),
    "int8_tensorwise": ("int8_tensorwise", {}),
    "int8_convrot": ("int8_tensorwise", {"convrot": True}),
    "nvfp4": ("nvfp4", {}),
    "mxfp8": ("mxfp8", {}),
    "convrot_w4a4": ("convrot_w4a4", {}),
}


def _layout(entry: Entry) -> tuple[Layout, dict[str, Any]] | None:
    noted = entry.notes.get("facts")
    for layout in LAYOUTS.values():
        if (facts := layout.facts(entry)) is not None:
            return layout, noted if isinstance(noted, dict) else facts
    return None


def _in_metadata(file: TensorFile) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    if METADATA not in file.metadata:
        return {}
    layers = strict_object(file.metadata[METADATA], f"{METADATA} of {file.path.name}").get("layers", {})
    if not isinstance(layers, dict) or not all(isinstance(facts, dict) for facts in layers.values()):
        raise BadFile(f"{METADATA} of {file.path.name} describes its layers in a way that cannot be read.")
    described = cast("dict[str, dict[str, Any]]", layers)
    there = {base: facts for base, facts in described.items() if f"{base}.weight" in file}
    return {base: (facts, {"facts": facts, "in_metadata": True}) for base, facts in there.items()}


def _in_tensors(file: TensorFile) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for name in file.names():
        base, _, key = name.rpartition(".")
        if key != TENSOR:
            continue
        info = file.info(name)
        if info.dtype != "U8" or info.end - info.start > _LARGEST:
            raise BadFile(f"{file.path.name}: {name!r} is no description of a layer.")
        raw = bytes(bytes_of(file.tensor(name)))
        facts = strict_object(raw, f"{name!r} of {file.path.name}")
        found[base] = facts, {"facts": facts, "text": raw.decode()}
    return found


def _part(file: TensorFile, base: str, facts: dict[str, Any], notes: dict[str, Any]) -> Part:
    kind = facts.get("format")
    if not isinstance(kind, str) or kind not in LAYOUTS:
        known = ", ".join(LAYOUTS)
        raise BadFile(f"{file.path.name}: layer {base!r} has format {str(kind)[:60]!r}; hasten reads {known}.")
    layout = LAYOUTS[kind]
    names = layout.tensors(file, base)
    marker = f"{base}.{TENSOR}"
    taken = (*names.values(), marker) if marker in file else tuple(names.values())
    shape = layout.shape(file, base)

    def read() -> Entry:
        tensors = {key: file.tensor(name) for key, name in names.items()}
        return layout.read(tensors, facts, notes)

    return Part(shape, taken, read)
