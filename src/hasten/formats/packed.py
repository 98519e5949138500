"""Integers packed into 32 bits: checkpoints of GPTQ (AutoGPTQ, GPTQModel) and of AutoAWQ.

GPTQ packs along the inputs: `qweight` int32 [inputs * bits / 32, outputs], `qzeros` [groups, outputs * bits / 32],
`scales` [groups, outputs], `g_idx` [inputs]. AutoAWQ packs 8 outputs in an order of its own: `qweight` [inputs,
outputs / 8]. A weight is scale * (code - zero); in the older version of GPTQ's files zeros are stored less 1.
"""

from __future__ import annotations

import contextlib
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch

from hasten.core.errors import HastenError
from hasten.core.files import read_json
from hasten.formats.checks import FLOATS, expect
from hasten.formats.format import BadFile, Entry
from hasten.formats.mapped import TensorFile
from hasten.formats.tensors import Closing, Part, TensorFormat, base_of, chosen, coded, is_linear
from hasten.kernels.modules import Input
from hasten.kernels.numbers import NUMBERS
from hasten.kernels.packing import pack, unpack
from hasten.kernels.rounding import affine_grid, fitting_group, grouped, with_scales
from hasten.kernels.weight import QuantizedWeight, Scales

WORD = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The output, of 8, that each half byte of AutoAWQ's words belongs to, lowest first."""
_BITS = (2, 3, 4, 8)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes from int32 [words, columns], a stream of bits down each column, as uint8 [words * 32 / bits, columns]."""
    if WORD % bits == 0:
        parts = [words >> bits * place & (1 << bits) - 1 for place in range(WORD // bits)]
        return torch.stack(parts, 1).reshape(-1, words.shape[1]).to(torch.uint8)
    every = torch.stack([(words >> place & 1).to(torch.uint8) for place in range(WORD)], 1)
    stream = every.reshape(-1, bits, words.shape[1])
    return sum((stream[:, place] << place for place in range(1, bits)), stream[:, 0])


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `unpack_words`."""
    columns = codes.shape[1]
    step = bits if WORD % bits == 0 else 1
    parts = codes if step == bits else torch.stack([codes >> place & 1 for place in range(bits)], 1)
    parts = parts.reshape(-1, WORD // step, columns)
    words = torch.zeros(parts.shape[0], columns, dtype=torch.int64)
    for place in range(WORD // step):
        words |= parts[:, place].to(torch.int64) << step * place
    # The highest bit is the sign.
    return torch.where(words >= 1 << WORD - 1, words - (1 << WORD), words).to(torch.int32)


class Packed(TensorFormat):
    """What both kinds of files share: `qweight`, `qzeros` and `scales` of a layer."""

    companions: ClassVar[int] = 4
    method: ClassVar[str]

    def claims(self, file: TensorFile) -> bool:
        """Files with packed layers of this shape."""
        bases = [name.removesuffix(".qzeros") for name in file.names() if name.endswith(".qzeros")]
        whole = all(f"{base}.qweight" in file and f"{base}.scales" in file for base in bases)
        return bool(bases) and whole and all(self.is_mine(file, base) for base in bases)

    @abstractmethod
    def is_mine(self, file: TensorFile, base: str) -> bool:
        """Do the shapes of a layer fit?"""

    @abstractmethod
    def part(self, file: TensorFile, base: str) -> Part:
        """The entry of a layer."""

    def parts(self, file: TensorFile) -> Mapping[str, Part]:
        """One for each packed weight."""
        bases = [name.removesuffix(".qweight") for name in file.names() if name.endswith(".qweight")]
        return {f"{base}.weight": self.part(file, base) for base in bases}

    def noted(self, entry: Entry) -> Mapping[str, Any]:
        """What the description of the file is made of."""
        weight, order = coded(entry), entry.notes.get("g_idx")
        groups = weight.groups if order is None else int(order.max()) + 1
        facts = {"bits": weight.number.bits, "group": weight.columns // groups, "ordered": order is not None}
        return facts | {"v2": entry.notes.get("v2", False)}

    def closing(self, entries: Mapping[str, Mapping[str, Any]], plain: Sequence[str]) -> Closing:
        """The metadata `quantization_config`, as a model's configuration needs it."""
        if not entries:
            return {}, {}
        first = next(iter(entries.values()))
        facts = {
            "quant_method": self.method,
            "bits": first["bits"],
            "group_size": first["group"],
            "desc_act": first["ordered"],
        }
        version = "gptq_v2" if first["v2"] else "gptq"
        more = (
            {"checkpoint_format": version, "sym": False}
            if self.method == "gptq"
            else {"version": "gemm", "zero_point": True}
        )
        return {}, {"quantization_config": json.dumps(facts | more)}

    def quantize(self, name: str, weight: torch.Tensor, kind: str) -> Entry:
        """Round to nearest in groups of 128 with zero points; what is no matrix in a block stays plain."""
        bits = int(chosen(kind, self).removeprefix("int"))
        if not is_linear(name, weight) or any(size % WORD for size in weight.shape):
            return Entry(weight)
        matrix = weight.detach().float()
        scale, zero = affine_grid(grouped(matrix, fitting_group(matrix.shape[1], 128)), bits)
        # Zeros are stored less 1, so that 0 cannot be one.
        return Entry(with_scales(weight.shape, matrix, bits, scale.to(torch.float16), zero.clamp(min=1)))


class GPTQ(Packed):
    """2, 3, 4 and 8 bits. Files with act-order have scales by column, which takes more memory than their groups do."""

    name: ClassVar[str] = "gptq"
    kinds: ClassVar[tuple[str, ...]] = ("int4", "int8", "int3", "int2")
    method: ClassVar[str] = "gptq"

    def is_mine(self, file: TensorFile, base: str) -> bool:
        """As many columns of words as of scales."""
        return file.info(f"{base}.qweight").shape[1:] == file.info(f"{base}.scales").shape[1:]

    def part(self, file: TensorFile, base: str) -> Part:
        """Bits follow from the shape of the zeros."""
        groups, outputs = expect(file, f"{base}.scales", FLOATS, (None, None)).shape
        zeros = expect(file, f"{base}.qzeros", "I32", (groups, None)).shape[1]
        words = expect(file, f"{base}.qweight", "I32", (None, outputs)).shape[0]
        bits = WORD * zeros // max(outputs, 1)
        inputs = WORD * words // max(bits, 1)
        good = bits in _BITS and zeros * WORD == bits * outputs and inputs * bits == words * WORD and groups
        if not good or inputs % groups or not inputs:
            raise BadFile(f"{file.path.name}: the layer {base!r} does not hold codes of 2, 3, 4 or 8 bits in groups.")
        order = f"{base}.g_idx"
        keys = ["qweight", "qzeros", "scales"]
        if order in file:
            expect(file, order, "I32", (inputs,))
            keys.append("g_idx")
        names = {key: f"{base}.{key}" for key in keys}
        later = _is_later(file)
        return Part((outputs, inputs), tuple(names.values()), lambda: _read_gptq(file, names, bits, later))

    def encodes(self, entry: Entry) -> bool:
        """Integers with whole zeros that the version of the file can store."""
        parts = _parts_of(entry, _BITS)
        if parts is None:
            return False
        least, zero = 0 if entry.notes.get("v2") else 1, parts[1]
        return least <= int(zero.min()) and int(zero.max()) < least + (1 << coded(entry).number.bits)

    def encode(self, name: str, entry: Entry) -> Mapping[str, torch.Tensor]:
        """The tensors of a layer."""
        parts = _parts_of(entry, _BITS)
        assert parts is not None
        (codes, zero), bits, base = parts, coded(entry).number.bits, base_of(name)
        scale = coded(entry).scale.codes
        order = torch.arange(codes.shape[1], dtype=torch.int32) // (codes.shape[1] // scale.shape[1])
        order = entry.notes.get("g_idx", order)
        if "g_idx" in entry.notes:
            first = [int((order == group).int().argmax()) for group in range(int(order.max()) + 1)]
            scale, zero = scale[:, first], zero[:, first]
        stored = zero - (0 if entry.notes.get("v2") else 1)
        found = {"qweight": pack_words(codes.t(), bits), "qzeros": _pack_rows(stored, bits), "scales": scale.t()}
        found |= {"g_idx": order} if entry.notes.get("ordered", True) else {}
        return {f"{base}.{key}": tensor for key, tensor in found.items()}


def _pack_rows(zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Zeros, [outputs, groups], packed along the outputs: [groups, outputs * bits / 32]."""
    return pack_words(zero.to(torch.uint8), bits).t()


def _read_gptq(file: TensorFile, names: Mapping[str, str], bits: int, later: bool) -> Entry:
    tensors = {key: file.tensor(name) for key, name in names.items()}
    codes = unpack_words(tensors["qweight"], bits).t().contiguous()
    zero = unpack_words(tensors["qzeros"].t().contiguous(), bits).to(torch.int16) + (0 if later else 1)
    scale = tensors["scales"].t().contiguous()
    inputs, groups = codes.shape[1], scale.shape[1]
    notes: dict[str, Any] = {"v2": later, "ordered": "g_idx" in tensors}
    order = tensors.get("g_idx")
    if order is not None and not torch.equal(order, torch.arange(inputs, dtype=torch.int32) // (inputs // groups)):
        if int(order.min()) < 0 or int(order.max()) != groups - 1 or order.unique().numel() != groups:
            raise BadFile("the groups that g_idx names are not those of the scales.")
        scale, zero = scale[:, order], zero[:, order]
        notes["g_idx"] = order
    zero = zero.to(torch.uint8) if bits < 8 else zero
    packed = pack(codes, bits) if bits < 8 else codes
    weight = QuantizedWeight(tuple(codes.shape), NUMBERS[f"uint{bits}"], inputs, packed, Scales(scale), zero=zero)
    return Entry(weight, notes=notes)


class AWQ(Packed):
    """4 bits with zero points, as AutoAWQ's GEMM version packs them."""

    name: ClassVar[str] = "awq"
    kinds: ClassVar[tuple[str, ...]] = ("int4",)
    method: ClassVar[str] = "awq"

    def is_mine(self, file: TensorFile, base: str) -> bool:
        """Eight times as many columns of scales as of words."""
        words, scales = file.info(f"{base}.qweight").shape, file.info(f"{base}.scales").shape
        return len(words) == len(scales) == 2 and 8 * words[1] == scales[1]

    def part(self, file: TensorFile, base: str) -> Part:
        """Four bits."""
        groups, outputs = expect(file, f"{base}.scales", FLOATS, (None, None)).shape
        inputs = expect(file, f"{base}.qweight", "I32", (None, outputs // 8)).shape[0]
        expect(file, f"{base}.qzeros", "I32", (groups, outputs // 8))
        if not groups or not inputs or outputs % 8 or inputs % groups:
            raise BadFile(f"{file.path.name}: the layer {base!r} does not hold codes of 4 bits in groups.")
        names = {key: f"{base}.{key}" for key in ("qweight", "qzeros", "scales")}
        return Part((outputs, inputs), tuple(names.values()), lambda: _read_awq(file, names))

    def encodes(self, entry: Entry) -> bool:
        """Integers of 4 bits with whole zeros."""
        parts = _parts_of(entry, (4,))
        return parts is not None and int(parts[1].min()) >= 0 and int(parts[1].max()) <= 15

    def encode(self, name: str, entry: Entry) -> Mapping[str, torch.Tensor]:
        """The tensors of a layer."""
        parts = _parts_of(entry, (4,))
        assert parts is not None
        words = [_awq_words(item) for item in parts]
        found = {"qweight": words[0], "qzeros": words[1], "scales": coded(entry).scale.codes.t()}
        return {f"{base_of(name)}.{key}": tensor for key, tensor in found.items()}


def _read_awq(file: TensorFile, names: Mapping[str, str]) -> Entry:
    tensors = {key: file.tensor(name) for key, name in names.items()}
    codes, zero = (_awq_codes(tensors[key]) for key in ("qweight", "qzeros"))
    scale = Scales(tensors["scales"].t().contiguous())
    weight = QuantizedWeight(tuple(codes.shape), NUMBERS["uint4"], codes.shape[1], pack(codes, 4), scale, zero=zero)
    return Entry(weight)


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    """int32 [rows, outputs / 8] as uint8 [outputs, rows]."""
    parts = [words >> 4 * AWQ_ORDER.index(place) & 0xF for place in range(8)]
    return torch.stack(parts, -1).reshape(words.shape[0], -1).t().contiguous().to(torch.uint8)


def _awq_words(codes: torch.Tensor) -> torch.Tensor:
    eights = codes.t().reshape(codes.shape[1], -1, 8)[..., list(AWQ_ORDER)]
    stream = eights.permute(2, 0, 1).reshape(8, -1)
    return pack_words(stream.to(torch.uint8), 4).reshape(codes.shape[1], -1)


def _parts_of(entry: Entry, widths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Unsigned codes [outputs, inputs] and zeros [outputs, groups] of an entry that such files can hold; else None."""
    weight, scale, number = coded(entry), coded(entry).scale, coded(entry).number
    bare = scale.coarse is None and scale.table is None and scale.offset is None and scale.codes.is_floating_point()
    alone = entry.given == Input() and entry.low_rank is None and weight.minimum is None
    grid = len(weight.shape) == 2 and weight.columns == weight.shape[1] and not any(s % WORD for s in weight.shape)
    if not (bare and alone and grid) or number.kind != "integer" or number.bits not in widths:
        return None
    if weight.zero is not None and (weight.zero.is_floating_point() or number.least):
        return None
    return _unsigned(weight)


def _unsigned(weight: QuantizedWeight) -> tuple[torch.Tensor, torch.Tensor] | None:
    number, scale = weight.number, weight.scale.codes
    codes = unpack(weight.codes, number.bits, weight.columns) if number.packed else weight.codes
    if number.dtype == torch.int8:
        codes = (codes.to(torch.int16) + 128).to(torch.uint8)
    zero = torch.full(scale.shape, -number.least) if weight.zero is None else weight.zero.to(torch.int64)
    good = scale.shape[0] == weight.shape[0]
    return (codes, zero.expand(scale.shape)) if good and scale.element_size() > 1 else None


def _is_later(file: TensorFile) -> bool:
    """Does the configuration beside the file, or in it, say that zeros are stored as they are (gptq_v2)?"""
    folder = file.path if file.path.is_dir() else file.path.parent
    found: list[object] = []
    for name in ("quantize_config.json", "config.json"):
        path = folder / name
        if path.is_file() and path.stat().st_size < 1 << 20:
            with contextlib.suppress(HastenError):
                found.append(read_json(path))
    with contextlib.suppress(ValueError):
        found.append(json.loads(file.metadata.get("quantization_config", "null")))
    configs = [cast("dict[str, object]", item) for item in found if isinstance(item, dict)]
    inner = [config.get("quantization_config", config) for config in configs]
    return any(isinstance(item, dict) and item.get("checkpoint_format") == "gptq_v2" for item in inner)
