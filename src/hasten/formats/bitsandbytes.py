"""Weights as bitsandbytes stores them: nf4 and fp4 in blocks, perhaps with coded scales, and 8-bit rows (LLM.int8)."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, cast

import torch

from hasten.formats.checks import expect
from hasten.formats.format import BadFile, Entry
from hasten.formats.fp4 import swap_nibbles
from hasten.formats.header import strict_object
from hasten.formats.mapped import TensorFile
from hasten.formats.streamed import bytes_of
from hasten.formats.tensors import Part, TensorFormat, base_of, chosen, coded, is_linear
from hasten.kernels import bitsandbytes as numbers
from hasten.kernels.modules import Input
from hasten.kernels.packing import unpack
from hasten.kernels.weight import QuantizedWeight, Scales

STATE = ".quant_state.bitsandbytes__"
_KINDS = ("nf4", "fp4")
_BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_LLM_INT8 = Input(activations="int8", threshold=6.0)
_NESTED = ("nested_absmax", "nested_quant_map")
_LARGEST_STATE = 4096
_DTYPES = ("float32", "float16", "bfloat16")


class BitsAndBytes(TensorFormat):
    """4 bits: `weight` uint8 [elements / 2, 1], `weight.absmax`, `weight.quant_map`, and the state as JSON in bytes.

    8 bits: `weight` int8, `SCB` float32 [outputs] (greatest magnitudes of the rows) and `weight_format`. Threshold and
    type of products stand in the model's configuration, not in these files; read are the library's own threshold, 6,
    and no type.
    """

    name: ClassVar[str] = "bitsandbytes"
    kinds: ClassVar[tuple[str, ...]] = ("nf4", "nf4_double", "fp4", "fp4_double", "int8")
    companions: ClassVar[int] = 6
    holds_computation: ClassVar[bool] = True

    def claims(self, file: TensorFile) -> bool:
        """Files with such a state or such magnitudes."""
        return any(STATE in name or name.endswith(".SCB") for name in file.names())

    def parts(self, file: TensorFile) -> Mapping[str, Part]:
        """One for each state, and for each `SCB`."""
        found: dict[str, Part] = {}
        for name in file.names():
            weight, state, _ = name.partition(STATE)
            if state:
                found[weight] = _four_bit_part(file, weight, name)
            elif name.endswith(".SCB"):
                base = name.removesuffix(".SCB")
                found[f"{base}.weight"] = _eight_bit_part(file, base)
        return found

    def encodes(self, entry: Entry) -> bool:
        """What the library could have made."""
        given = entry.given
        if given.smooth is not None or given.rotation != 1 or given.scale is not None or entry.low_rank is not None:
            return False
        if _is_eight_bit(coded(entry)):
            return given.activations in ("none", "int8")
        return given.activations == "none" and _flat(coded(entry)) is not None

    def encode(self, name: str, entry: Entry) -> Mapping[str, torch.Tensor]:
        """The tensors of a layer."""
        weight = coded(entry)
        if _is_eight_bit(weight):
            code = torch.tensor(0, dtype=torch.uint8)
            base = base_of(name)
            found = {name: weight.codes, f"{base}.SCB": weight.scale.codes.reshape(-1)}
            return found | ({f"{base}.weight_format": code} if entry.notes.get("format", True) else {})
        flat = _flat(weight)
        assert flat is not None
        return _four_bit_tensors(name, weight, flat, entry.notes)

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """As the library does, to the last bit; what is no matrix in a block stays plain."""
        if not is_linear(name, weight):
            return Entry(weight)
        if chosen(kind, self) == "int8":
            return Entry(numbers.quantize_8bit(weight), _LLM_INT8)
        codes = cast("numbers.Kind", kind.removesuffix("_double"))
        notes = {"dtype": str(weight.dtype).removeprefix("torch.")}
        return Entry(numbers.quantize_4bit(weight, codes, double=kind.endswith("_double")), notes=notes)


@dataclass(frozen=True)
class State:
    """What the JSON of a 4-bit weight says."""

    kind: numbers.Kind
    block: int
    dtype: str
    shape: tuple[int, ...]
    offset: float | None


def _state(file: TensorFile, name: str) -> State:
    info = file.info(name)
    if info.dtype != "U8" or info.end - info.start > _LARGEST_STATE:
        raise BadFile(f"{file.path.name}: {name!r} is no state of a quantized weight.")
    facts = strict_object(bytes(bytes_of(file.tensor(name))), f"{name!r} of {file.path.name}")
    shape, kind, block = facts.get("shape"), facts.get("quant_type"), facts.get("blocksize")
    sizes = cast("list[object]", shape) if isinstance(shape, list) else []
    good = 0 < len(sizes) <= 8 and all(type(size) is int and 0 < size < 1 << 40 for size in sizes)
    offset = facts.get("nested_offset")
    nested = offset is None or (type(offset) is float and facts.get("nested_blocksize") == numbers.NESTED_BLOCK)
    dtype = facts.get("dtype")
    if not good or kind not in _KINDS or block not in _BLOCKS or not nested or dtype not in _DTYPES:
        raise BadFile(
            f"{file.path.name}: {name!r} describes its weight in a way that cannot be read: {str(facts)[:200]}."
        )
    assert isinstance(block, int)
    assert isinstance(dtype, str)
    return State(kind, block, dtype, tuple(cast("list[int]", sizes)), cast("float | None", offset))


def _four_bit_part(file: TensorFile, weight: str, state_name: str) -> Part:
    state = _state(file, state_name)
    count = math.prod(state.shape)
    blocks = -(-count // state.block)
    info = file.info(weight)
    if count % 2 or info.end - info.start != count // 2:
        raise BadFile(f"{file.path.name}: {weight!r} does not hold {count} codes of 4 bits.")
    expect(file, f"{weight}.absmax", "F32" if state.offset is None else "U8", (blocks,))
    expect(file, f"{weight}.quant_map", "F32", (16,))
    keys = ["absmax", "quant_map"]
    if state.offset is not None:
        expect(file, f"{weight}.nested_absmax", "F32", (-(-blocks // numbers.NESTED_BLOCK),))
        expect(file, f"{weight}.nested_quant_map", "F32", (256,))
        keys += _NESTED
    names = {key: f"{weight}.{key}" for key in keys}
    taken = (weight, state_name, *names.values())
    return Part(state.shape, taken, lambda: _read_four_bit(file, weight, names, state))


def _read_four_bit(file: TensorFile, weight: str, names: Mapping[str, str], state: State) -> Entry:
    stored = file.tensor(weight)
    tensors = {key: file.tensor(name) for key, name in names.items()}
    codes = unpack(swap_nibbles(stored.reshape(-1).view(torch.uint8)).reshape(1, -1), 4, math.prod(state.shape))
    scales = Scales(tensors["absmax"].unsqueeze(0))
    if state.offset is not None:
        coarse, entries = tensors["nested_absmax"].unsqueeze(0), tensors["nested_quant_map"]
        scales = Scales(scales.codes, coarse, entries, torch.tensor(state.offset))
    found = numbers.four_bit(state.shape, codes.reshape(-1), scales, state.kind, state.block)
    notes: dict[str, Any] = {"dtype": state.dtype, "kind": state.kind, "block": state.block}
    if stored.dtype != torch.uint8:
        notes["storage"] = str(stored.dtype).removeprefix("torch.")
    return Entry(replace(found, table=tensors["quant_map"]), notes=notes)


def _eight_bit_part(file: TensorFile, base: str) -> Part:
    rows, columns = expect(file, f"{base}.weight", "I8", (None, None)).shape
    expect(file, f"{base}.SCB", "F32", (rows,))
    order = f"{base}.weight_format"
    if order in file:
        expect(file, order, "U8", ())
        if file.tensor(order).item():
            raise BadFile(f"{file.path.name}: {base!r} is stored in tiles of a card; only rows can be read.")
    taken = (f"{base}.weight", f"{base}.SCB", *((order,) if order in file else ()))

    def read() -> Entry:
        codes, absmax = file.tensor(f"{base}.weight"), file.tensor(f"{base}.SCB")
        weight = numbers.eight_bit((rows, columns), codes, absmax.unsqueeze(1))
        return Entry(weight, _LLM_INT8, notes={"format": order in file})

    return Part((rows, columns), taken, read)


def _is_eight_bit(weight: QuantizedWeight) -> bool:
    coarse, scale = weight.scale.coarse, weight.scale
    same = coarse is not None and torch.equal(coarse, torch.full((1, 1), 1 / 127))
    rows = scale.codes.shape == (weight.shape[0], 1) and scale.codes.dtype == torch.float32
    plain = weight.zero is None and weight.minimum is None and scale.table is None and scale.offset is None
    matrix = len(weight.shape) == 2 and weight.columns == weight.shape[1]
    return weight.number.name == "int8" and same and rows and plain and matrix


@dataclass(frozen=True)
class Flat:
    """A 4-bit weight as the library has it."""

    kind: numbers.Kind
    block: int
    scales: Scales


def _flat(weight: QuantizedWeight) -> Flat | None:
    """Kind, block and scales of a weight, if the library could have made it; checked by putting it together again."""
    kind: numbers.Kind | None = next((k for k in _KINDS if _same_table(weight, k)), None)
    if kind is None or weight.zero is not None or weight.minimum is not None:
        return None
    unit = weight.columns // weight.scale.codes.shape[1]
    block = unit if unit in _BLOCKS else numbers.BLOCK
    if block % unit or weight.scale.codes.shape[0] != weight.codes.shape[0]:
        return None
    scales = numbers.flat_scales(weight, block)
    again = numbers.four_bit(weight.shape, unpack(weight.codes, 4, weight.columns).reshape(-1), scales, kind, block)
    same = again.columns == weight.columns and _same_scales(again.scale, weight.scale)
    return Flat(kind, block, scales) if same else None


def _same_table(weight: QuantizedWeight, kind: numbers.Kind) -> bool:
    return (
        weight.number.name == "table4" and weight.table is not None and torch.equal(weight.table, numbers.table(kind))
    )


def _same_scales(one: Scales, two: Scales) -> bool:
    """Equal in type and value, and of a type that the library stores."""
    dtype = torch.float32 if two.coarse is None else torch.uint8
    plain = two.coarse is None and two.table is None and two.offset is None
    nested = two.coarse is not None and two.table is not None and two.offset is not None
    if two.codes.dtype != dtype or not (plain or nested) or not torch.equal(one.codes, two.codes):
        return False
    return plain or (one.coarse is not None and two.coarse is not None and torch.equal(one.coarse, two.coarse))


def _four_bit_tensors(
    name: str, weight: QuantizedWeight, flat: Flat, notes: Mapping[str, Any]
) -> dict[str, torch.Tensor]:
    assert weight.table is not None
    packed = swap_nibbles(weight.codes.reshape(-1)).reshape(-1, 1)
    storage = getattr(torch, notes["storage"]) if "storage" in notes else torch.uint8
    packed = packed.reshape(-1).view(storage).reshape(-1, 1)
    # The library's map of fp4 has no negative zero.
    found = {name: packed, f"{name}.absmax": flat.scales.codes.reshape(-1), f"{name}.quant_map": weight.table + 0.0}
    facts: dict[str, Any] = {"quant_type": flat.kind, "blocksize": flat.block, "dtype": notes.get("dtype", "bfloat16")}
    facts["shape"] = list(weight.shape)
    coarse, entries, offset = flat.scales.coarse, flat.scales.table, flat.scales.offset
    if coarse is not None and entries is not None and offset is not None:
        found |= {f"{name}.nested_absmax": coarse.reshape(-1), f"{name}.nested_quant_map": entries}
        facts |= {"nested_blocksize": numbers.NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset.item()}
    text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
    return found | {f"{name}{STATE}{flat.kind}": text}
