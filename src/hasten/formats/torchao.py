"""Weights as torchao flattens its tensor classes into safetensors files (torchao 0.16 and later).

A weight `blocks.0.proj.weight` is stored as `blocks.0.proj._weight_qdata`, `_weight_scale` and others; the metadata
have under the weight's name what it is, as JSON, and all names under `tensor_names`. Classes are known by their names
and never made: Int8Tensor, Float8Tensor, IntxUnpackedToInt8Tensor and Int4Tensor. Source: https://github.com/pytorch/ao.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch

from hasten.core.errors import HastenError
from hasten.formats.checks import FLOATS, expect
from hasten.formats.format import BadFile, Entry
from hasten.formats.header import strict_json, strict_object
from hasten.formats.mapped import TensorFile
from hasten.formats.scaled import FLOAT8, scale_grid
from hasten.formats.tensors import Closing, Part, TensorFormat, chosen, coded, is_linear
from hasten.kernels.modules import Input
from hasten.kernels.numbers import NUMBERS, Number
from hasten.kernels.packing import pack, unpack
from hasten.kernels.rounding import quantize_float8, quantize_integer
from hasten.kernels.weight import QuantizedWeight, Scales

_NAMES = "tensor_names"
_CODES = {
    "Int8Tensor": ("I8",),
    "Float8Tensor": tuple(FLOAT8),
    "IntxUnpackedToInt8Tensor": ("I8",),
    "Int4Tensor": ("I8", "U8"),
}


class TorchAO(TensorFormat):
    """Integers of 1 to 8 bits by row, tensor or group, 8-bit floats, and 4-bit integers in halves of bytes."""

    name: ClassVar[str] = "torchao"
    kinds: ClassVar[tuple[str, ...]] = ("int8", "int8_dynamic", "float8", "float8_dynamic", "int4")
    companions: ClassVar[int] = 4

    def claims(self, file: TensorFile) -> bool:
        """Files whose metadata list the names of tensors and describe them."""
        return _NAMES in file.metadata

    def parts(self, file: TensorFile) -> Mapping[str, Part]:
        """One for each tensor that is of one of the classes."""
        names = strict_json(file.metadata.get(_NAMES, ""), f"{_NAMES} of {file.path.name}")
        found: dict[str, Part] = {}
        for name in cast("list[object]", names) if isinstance(names, list) else [None]:
            if not isinstance(name, str) or name not in file.metadata:
                raise BadFile(f"{file.path.name} does not describe all the tensors that it lists.")
            text = file.metadata[name]
            facts = strict_object(text, f"the description of {name[:200]!r} in {file.path.name}")
            if facts.get("_type") != "Tensor":
                found[name] = _part(file, name, text, facts)
        return found

    def encodes(self, entry: Entry) -> bool:
        """What one of the classes can hold."""
        return _class_of(entry) is not None

    def encode(self, name: str, entry: Entry) -> Mapping[str, torch.Tensor]:
        """The tensors of a weight."""
        kind = _class_of(entry)
        assert kind is not None
        prefix = _prefix(name)
        return {f"{prefix}{key}": tensor for key, tensor in _tensors(kind, entry).items()}

    def noted(self, entry: Entry) -> Mapping[str, Any]:
        """The description."""
        return {"text": entry.notes.get("text") or _description(entry)}

    def closing(self, entries: Mapping[str, Mapping[str, Any]], plain: Sequence[str]) -> Closing:
        """All descriptions."""
        found = {name: str(notes["text"]) for name, notes in entries.items()}
        found |= dict.fromkeys(plain, json.dumps({"_type": "Tensor"}))
        return {}, found | {_NAMES: json.dumps(list(found))}

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """By row, or in groups of 32 for 4 bits; what is no matrix in a block stays plain."""
        if not is_linear(name, weight):
            return Entry(weight)
        dynamic = chosen(kind, self).endswith("_dynamic")
        if kind.startswith("int8"):
            return Entry(quantize_integer(weight, 8), Input(activations="int8" if dynamic else "none"))
        if kind.startswith("float8"):
            return Entry(quantize_float8(weight), Input(activations="float8" if dynamic else "none"))
        return Entry(quantize_integer(weight, 4, 32, scales=torch.bfloat16))


def _prefix(name: str) -> str:
    module, dot, last = name.rpartition(".")
    return f"{module}{dot}_{last}_"


def _part(file: TensorFile, name: str, text: str, facts: dict[str, object]) -> Part:
    kind, listed, data = facts.get("_type"), facts.get("_tensor_data_names"), facts.get("_data")
    if kind not in _CODES or not isinstance(listed, list) or not isinstance(data, dict):
        known = ", ".join(_CODES)
        raise BadFile(
            f"{file.path.name}: {name[:200]!r} is of torchao's class {str(kind)[:60]!r}; hasten reads {known}."
        )
    keys = [key for key in cast("list[object]", listed) if isinstance(key, str)]
    extra = set(keys) - {"qdata", "scale", "zero_point"}
    if extra or not {"qdata", "scale"} <= set(keys):
        raise BadFile(
            f"{file.path.name}: {name[:200]!r} has the tensors {', '.join(sorted(keys))[:200]}, which is not known."
        )
    names = {key: f"{_prefix(name)}{key}" for key in keys}
    rows, columns = expect(file, names["qdata"], _CODES[str(kind)], (None, None)).shape
    expect(file, names["scale"], (*FLOATS, "F64"))
    shape = (rows, columns * 2 if kind == "Int4Tensor" else columns)
    fields = cast("dict[str, object]", data)
    number = _number(str(kind), fields, file.info(names["qdata"]).dtype)
    return Part(shape, tuple(names.values()), lambda: _read(file, names, str(kind), number, shape, text, fields))


def _number(kind: str, data: dict[str, object], dtype: str) -> Number:
    if kind == "Float8Tensor":
        return NUMBERS[FLOAT8[dtype]]
    target = data.get("target_dtype")
    name = cast("dict[str, object]", target).get("_data") if isinstance(target, dict) else None
    name = {"Int8Tensor": "int8", "Int4Tensor": "int4"}.get(kind, name)
    if not isinstance(name, str) or not name.startswith("int") or name not in NUMBERS:
        raise BadFile(f"a weight of torchao's class {kind} has the type {str(name)[:40]!r}.")
    return NUMBERS[name]


def _read(
    file: TensorFile, names: Mapping[str, str], kind: str, number: Number, shape: tuple[int, ...], text: str,
    data: Mapping[str, object],
) -> Entry:  # fmt: skip
    tensors = {key: file.tensor(name) for key, name in names.items()}
    notes: dict[str, Any] = {"text": text, "kind": kind, "scale": list(tensors["scale"].shape)}
    notes["codes"] = str(tensors["qdata"].dtype).removeprefix("torch.")
    zero, low = tensors.get("zero_point"), None
    if kind == "Int4Tensor":
        # Scales and zeros lie group by group, and the zero is added after scaling.
        scale, low = tensors["scale"].t().contiguous(), None if zero is None else Scales(-zero.t().contiguous())
        zero = None
    else:
        scale = scale_grid(tensors["scale"], *shape)
    if zero is not None and not zero.any():
        notes["zeros"], zero = [str(zero.dtype).removeprefix("torch."), list(zero.shape)], None
    weight = QuantizedWeight(shape, number, shape[1], _codes(tensors["qdata"], number, kind), Scales(scale), low, zero)
    return Entry(weight, Input(activations=_activations(data, number)), notes=notes)


def _activations(data: Mapping[str, object], number: Number) -> Any:
    if data.get("act_quant_kwargs") is None:
        return "none"
    return "float8" if number.kind == "float" else "int8"


def _codes(stored: torch.Tensor, number: Number, kind: str) -> torch.Tensor:
    if kind == "Int4Tensor":
        return stored.view(torch.uint8) ^ 0x88
    if not number.packed:
        return stored
    if int(stored.min()) < number.least or int(stored.max()) > number.greatest:
        raise BadFile(f"codes of type {number.name} lie outside of its range.")
    return pack((stored.to(torch.int16) + number.shift).to(torch.uint8), number.bits)


def _class_of(entry: Entry) -> str | None:
    """The class that holds an entry, as noted or found out; None if there is none."""
    weight, given, scale = coded(entry), entry.given, coded(entry).scale
    bare = scale.coarse is None and scale.table is None and scale.offset is None and scale.codes.is_floating_point()
    still = given.smooth is None and given.rotation == 1 and given.scale is None and entry.low_rank is None
    grid = len(weight.shape) == 2 and weight.columns == weight.shape[1] and scale.codes.element_size() > 1
    if not (bare and still and grid):
        return None
    return _float_class(entry) if weight.number.kind == "float" else _integer_class(entry)


def _float_class(entry: Entry) -> str | None:
    plain = coded(entry).zero is None and coded(entry).minimum is None
    return "Float8Tensor" if plain and entry.given.activations in ("none", "float8") else None


def _integer_class(entry: Entry) -> str | None:
    weight, kind = coded(entry), entry.notes.get("kind")
    if weight.minimum is not None or kind == "Int4Tensor":
        halves = weight.number.name == "int4" and weight.zero is None and entry.given == Input()
        return "Int4Tensor" if halves and kind == "Int4Tensor" else None
    signed = weight.number.kind == "integer" and weight.number.least < 0
    zero = weight.zero is None or weight.zero.dtype == torch.int8
    if not signed or not zero:
        return None
    if weight.number.name == "int8" and kind != "IntxUnpackedToInt8Tensor":
        return "Int8Tensor" if entry.given.activations in ("none", "int8") else None
    return "IntxUnpackedToInt8Tensor" if entry.given.activations == "none" or "text" in entry.notes else None


def _tensors(kind: str, entry: Entry) -> dict[str, torch.Tensor]:
    weight, notes = coded(entry), entry.notes
    codes, scale = weight.codes, weight.scale.codes
    if kind == "Int4Tensor":
        stored = (codes ^ 0x88).view(getattr(torch, notes.get("codes", "int8")))
        zeros = {} if weight.minimum is None else {"zero_point": -weight.minimum.codes.t()}
        return {"qdata": stored, "scale": scale.t(), **zeros}
    if weight.number.packed:
        codes = (unpack(codes, weight.number.bits, weight.columns).to(torch.int16) - weight.number.shift).to(torch.int8)
    found = {"qdata": codes, "scale": _scale(scale, notes.get("scale"))}
    if weight.zero is not None:
        return found | {"zero_point": weight.zero}
    if "zeros" in notes:
        dtype, shape = notes["zeros"]
        return found | {"zero_point": torch.zeros(shape, dtype=getattr(torch, dtype))}
    if kind == "Float8Tensor" or "text" in notes:
        return found
    return found | {"zero_point": torch.zeros(scale.shape, dtype=torch.int8)}


def _scale(scale: torch.Tensor, shape: list[int] | None) -> torch.Tensor:
    """Blocks of several rows have one scale in the file."""
    if shape is None or list(scale.shape) == shape:
        return scale
    if len(shape) == 2 and scale.shape[0] % shape[0] == 0:
        return scale[:: scale.shape[0] // shape[0]]
    return scale.reshape(shape)


def _description(entry: Entry) -> str:
    """What torchao needs to build its tensor again."""
    weight, dynamic = coded(entry), entry.given.activations != "none"
    kind = _class_of(entry)
    rows = 1 if weight.scale.codes.shape[0] > 1 else weight.shape[0]
    block = [rows, weight.columns // weight.groups]
    dtype = {"_type": "torch.dtype", "_data": "bfloat16"}
    data: dict[str, Any] = {"block_size": block, "dtype": dtype}
    row = {"_type": "PerRow", "_data": {"dim": -1}}
    if kind == "Float8Tensor":
        preference = {"_type": "KernelPreference", "_data": "AUTO"}
        facts: dict[str, Any] = {
            "float8_dtype": {"_type": "torch.dtype", "_data": weight.number.name},
            "granularity": row,
        }
        facts |= {"mm_config": None, "hp_value_lb": None, "hp_value_ub": None, "kernel_preference": preference}
        kwargs = {"_type": "QuantizeTensorToFloat8Kwargs", "_data": facts}
        data |= {"mm_config": None, "act_quant_kwargs": kwargs if dynamic else None, "kernel_preference": preference}
    elif kind == "Int8Tensor":
        facts = {
            "granularity": row,
            "mapping_type": {"_type": "MappingType", "_data": "SYMMETRIC"},
            "reduce_range": False,
        }
        kwargs = {"_type": "QuantizeTensorToInt8Kwargs", "_data": facts}
        data |= {"act_quant_kwargs": kwargs if dynamic else None, "reduce_range": False}
    elif kind == "IntxUnpackedToInt8Tensor":
        data |= {"target_dtype": {"_type": "torch.dtype", "_data": weight.number.name}, "activation_quantization": None}
    else:
        raise HastenError("torchao has no class for such a weight.")
    names = ["qdata", "scale"] if kind == "Float8Tensor" else ["qdata", "scale", "zero_point"]
    return json.dumps({"_type": kind, "_data": data, "_tensor_data_names": names})
