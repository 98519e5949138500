"""ComfyUI's `fp8_scaled` files, such as flux1-dev-kontext_fp8_scaled.safetensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from hasten.formats.format import BadFile, Entry, Reader
from hasten.formats.header import DTYPES, NAMES
from hasten.formats.mapped import TensorFile
from hasten.formats.scaled import Scaled
from hasten.formats.streamed import bytes_of
from hasten.formats.tensors import Closing, TensorReader, chosen, coded, is_linear
from hasten.kernels.modules import Input
from hasten.kernels.rounding import quantize_float8

MARKER = "scaled_fp8"
_MOST = 16


class Fp8Scaled(Scaled):
    """8-bit floats with one scale for a weight, `scale_weight` (or `weight_scale`), and perhaps one for its input.

    A tensor `scaled_fp8` marks the file: its type is the type of the weights, and two elements say that products are to
    be computed in full precision, so that scales of inputs are kept and not used.
    """

    name: ClassVar[str] = "fp8_scaled"
    kinds: ClassVar[tuple[str, ...]] = ("float8_e4m3fn", "float8_e5m2")
    spelling: ClassVar[tuple[str, str]] = ("scale_weight", "scale_input")
    holds_nvfp4: ClassVar[bool] = False

    def claims(self, file: TensorFile) -> bool:
        """Files with the marker, or with weights' scales of that spelling, and without the newer description."""
        names = file.names()
        newer = any(name.endswith(".comfy_quant") for name in names)
        return not newer and any(_is_marker(name) or name.endswith(".scale_weight") for name in names)

    def reader(self, file: TensorFile) -> Reader:
        """The marker is no entry; what it says is noted with every layer."""
        markers = [name for name in file.names() if _is_marker(name)]
        if len(markers) > 1 or any(file.info(name).end - file.info(name).start > _MOST for name in markers):
            raise BadFile(f"{file.path.name} has several markers {MARKER}, or one that is no marker.")
        marker = _noted(file, markers[0]) if markers else None
        parts = {
            name: replace(part, read=lambda read=part.read: _marked(read(), marker))
            for name, part in self.parts(file).items()
        }
        return TensorReader(file, parts, markers)

    def fits(self, entry: Entry) -> bool:
        """One scale for the weight, and a fixed one for rounded activations."""
        full = _full_precision(entry.notes.get("marker"))
        rounded = entry.given.scale is not None and not full
        return coded(entry).scale.codes.numel() == 1 and entry.given.activations == ("float8" if rounded else "none")

    def closing(self, entries: Mapping[str, Mapping[str, Any]], plain: Sequence[str]) -> Closing:
        """The marker, as it was in the file that the layers came from, if they came from one."""
        noted: list[dict[str, Any] | None] = [notes["marker"] for notes in entries.values() if "marker" in notes]
        if entries and not noted:
            return {MARKER: torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
        if not noted or (first := noted[0]) is None:
            return {}, {}
        raw = torch.tensor(first["bytes"], dtype=torch.uint8)
        return {first["name"]: raw.view(DTYPES[first["dtype"]]).reshape(first["shape"])}, {}

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """Round matrices with one scale each; what is no such matrix stays plain."""
        if not is_linear(name, weight):
            return Entry(weight)
        return Entry(quantize_float8(weight, chosen(kind, self), block="tensor"))


def _is_marker(name: str) -> bool:
    return name == MARKER or name.endswith(f".{MARKER}")


def _noted(file: TensorFile, name: str) -> dict[str, Any]:
    tensor = file.tensor(name)
    return {"name": name, "dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "bytes": list(bytes_of(tensor))}


def _marked(entry: Entry, marker: dict[str, Any] | None) -> Entry:
    given = entry.given
    if _full_precision(marker):
        given = Input(scale=given.scale)
    return replace(entry, given=given, notes={**entry.notes, "marker": marker})


def _full_precision(marker: dict[str, Any] | None) -> bool:
    return marker is not None and torch.Size(marker["shape"]).numel() == 2
