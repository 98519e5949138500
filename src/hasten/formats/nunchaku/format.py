"""nunchaku's files and those of nunchaku_lite, with biases as plain layers have them."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from hasten.core.errors import HastenError
from hasten.core.files import read_json
from hasten.formats.checks import expect
from hasten.formats.format import BadFile, Entry
from hasten.formats.mapped import TensorFile
from hasten.formats.nunchaku import packing
from hasten.formats.nunchaku.layers import (
    FIRST,
    HALF,
    SECOND,
    Spelling,
    awq_tensors,
    encode_awq,
    encode_svdq,
    is_awq,
    is_svdq,
    read_awq,
    read_svdq,
    shift_of_bias,
    svdq_tensors,
)
from hasten.formats.tensors import Closing, Part, TensorFormat, TensorWriter, base_of, coded

_AFTER_GELU = re.compile(r"(^|\.)(mlp_fc2|mlp_context_fc2|net\.2)$")
_QUANT_METHOD = "nunchaku_lite"


class Nunchaku(TensorFormat):
    """SVDQuant layers (`qweight` int8 in tiles) and AWQ layers of modulations (`qweight` int32), with fused names.

    Activations of 4 bits are computed with 8. Layers after a GELU were made for inputs shifted by 0.171875 if their
    codes are integers; their biases are given for inputs as they are. Rows of modulations alternate between 3 or 6
    parts in the file, and 1 has been added to the scales' biases; both are undone. Written again, all is as before.
    """

    name: ClassVar[str] = "nunchaku"
    companions: ClassVar[int] = 9
    spelling: ClassVar[Spelling] = FIRST
    adapted: ClassVar[bool] = True
    """Are inputs after a GELU shifted, and rows of modulations interleaved?"""

    def claims(self, file: TensorFile) -> bool:
        """Files with packed weights of these kinds, unless they say that they are nunchaku_lite's."""
        return _packed(file) and not _is_lite(file)

    def parts(self, file: TensorFile) -> Mapping[str, Part]:
        """A weight for each `qweight`, and its bias, which is packed as well."""
        found: dict[str, Part] = {}
        for name in file.names():
            if name.endswith(".qweight"):
                base = name.removesuffix(".qweight")
                integer = file.info(name).dtype == "I32"
                found |= self._awq_parts(file, base) if integer else self._svdq_parts(file, base)
        return found

    def _svdq_parts(self, file: TensorFile, base: str) -> dict[str, Part]:
        names = svdq_tensors(file, base)
        rows, half = file.info(names["qweight"]).shape
        floating = file.info(names["wscales"]).dtype == "F8_E4M3"
        shifted = not floating and self.adapted and _after_gelu(base, _widths(file, base), 2 * half)
        weight = Part((rows, 2 * half), tuple(names.values()), lambda: read_svdq(file, names))
        if (bias := f"{base}.bias") not in file:
            return {f"{base}.weight": weight}
        expect(file, bias, HALF, (rows,))

        def read() -> Entry:
            stored = packing.unpack_vector(file.tensor(bias))
            if not shifted:
                return Entry(stored)
            return Entry(stored.float() + shift_of_bias(read_svdq(file, names)), notes={"stored": stored})

        return {f"{base}.weight": weight, bias: Part((rows,), (bias,), read)}

    def _awq_parts(self, file: TensorFile, base: str) -> dict[str, Part]:
        names = awq_tensors(file, base)
        quarter, half = file.info(names["qweight"]).shape
        shape = 4 * quarter, 2 * half
        splits = self.splits(shape)
        weight = Part(shape, tuple(names.values()), lambda: read_awq(file, names, splits))
        if (bias := f"{base}.bias") not in file or splits == 1:
            return {f"{base}.weight": weight}
        expect(file, bias, HALF, (shape[0],))
        return {
            f"{base}.weight": weight,
            bias: Part((shape[0],), (bias,), lambda: Entry(_without_ones(file.tensor(bias), splits))),
        }

    def splits(self, shape: Sequence[int]) -> int:
        """Parts between which rows alternate: modulations have 3 or 6 times as many outputs as inputs."""
        times, rest = divmod(shape[0], shape[1])
        return times if self.adapted and not rest and times in (3, 6) else 1

    def create(self, path: Path, names: Sequence[str], metadata: Mapping[str, Any]) -> TensorWriter:
        """Begin a file."""
        begun = super().create(path, names, metadata)
        return NunchakuWriter(self, begun, names)

    def encodes(self, entry: Entry) -> bool:
        """SVDQuant with groups of 64 (integers) or 16 (floats), sides multiples of 128; AWQ with groups of 64."""
        return is_svdq(entry) or is_awq(entry)

    def encode(self, name: str, entry: Entry) -> Mapping[str, torch.Tensor]:
        """The tensors of a layer but its bias."""
        tensors = encode_svdq(entry, self.spelling) if is_svdq(entry) else encode_awq(entry, self.parts_of(entry))
        return {f"{base_of(name)}.{key}": tensor for key, tensor in tensors.items()}

    def parts_of(self, entry: Entry) -> int:
        """`splits` of an entry in an AWQ layer."""
        return self.splits(coded(entry).shape)

    def noted(self, entry: Entry) -> Mapping[str, Any]:
        """What the description of the file is made of."""
        if is_awq(entry):
            return {"awq": True}
        rank = 0 if entry.low_rank is None else entry.low_rank.up.shape[1]
        return {"rank": rank, "floating": coded(entry).number.kind == "table"}

    def closing(self, entries: Mapping[str, Mapping[str, Any]], plain: Sequence[str]) -> Closing:
        """The metadata `quantization_config` that nunchaku looks at."""
        layers = [notes for notes in entries.values() if "rank" in notes]
        if not layers:
            return {}, {}
        floating = any(notes["floating"] for notes in layers)
        kind: dict[str, Any] = {"dtype": "fp4_e2m1_all", "scale_dtype": "fp8_e4m3_nan", "group_size": 16}
        kind = kind if floating else {"dtype": "int4", "scale_dtype": None, "group_size": 64}
        rank = max(notes["rank"] for notes in layers)
        return {}, {
            "quantization_config": json.dumps({"method": "svdquant", "weight": kind, "activation": kind, "rank": rank})
        }


class NunchakuLite(Nunchaku):
    """The same packing under the module names of diffusers: no shifted inputs, and modulations in their own order."""

    name: ClassVar[str] = "nunchaku_lite"
    spelling: ClassVar[Spelling] = SECOND
    adapted: ClassVar[bool] = False

    def claims(self, file: TensorFile) -> bool:
        """Files whose configuration says so, or that have these names and no description of nunchaku's own."""
        return _packed(file) and _is_lite(file)

    def closing(self, entries: Mapping[str, Mapping[str, Any]], plain: Sequence[str]) -> Closing:
        """What `config.json` of a model in diffusers needs under `quantization_config`, as metadata."""
        svdq = {name: notes for name, notes in entries.items() if "rank" in notes}
        awq = [base_of(name) for name, notes in entries.items() if "awq" in notes]
        config: dict[str, Any] = {"quant_method": _QUANT_METHOD}
        if svdq:
            floating = any(notes["floating"] for notes in svdq.values())
            config["svdq_w4a4"] = {
                "precision": "nvfp4" if floating else "int4", "group_size": 16 if floating else 64,
                "rank": max(notes["rank"] for notes in svdq.values()), "targets": [base_of(name) for name in svdq],
            }  # fmt: skip
        if awq:
            config["awq_w4a16"] = {"precision": "int4", "group_size": 64, "targets": awq}
        return {}, {"quantization_config": json.dumps(config)} if entries else {}


class NunchakuWriter(TensorWriter):
    """Keeps a bias until its weight has come, which says how it is stored."""

    def __init__(self, layout: Nunchaku, begun: TensorWriter, names: Sequence[str]) -> None:
        self.layout: Nunchaku = layout
        self.metadata, self.file, self.coded, self.plain = begun.metadata, begun.file, begun.coded, begun.plain
        self._names = set(names)
        self._waiting: dict[str, Entry] = {}
        self._stored: dict[str, Any] = {}
        self._widths: dict[str, int] = {}

    def add(self, name: str, entry: Entry) -> None:
        """Write an entry, or keep it, if it is the bias of a weight to come."""
        base = name.removesuffix(".bias")
        weight = f"{base}.weight"
        if name.endswith(".bias") and weight in self._names and isinstance(entry.weight, torch.Tensor):
            self._waiting[base] = entry
        else:
            super().add(name, entry)
            self._stored[base_of(name)] = entry if not isinstance(entry.weight, torch.Tensor) else None
        base = base if base in self._waiting else base_of(name)
        if base in self._waiting and base in self._stored:
            self._add_bias(base, self._waiting.pop(base))

    def _add_bias(self, base: str, bias: Entry) -> None:
        entry: Entry | None = self._stored[base]
        tensor = bias.weight
        assert isinstance(tensor, torch.Tensor)
        self.file.add(f"{base}.bias", tensor if entry is None else self._packed(base, entry, bias, tensor))

    def _packed(self, base: str, entry: Entry, bias: Entry, tensor: torch.Tensor) -> torch.Tensor:
        if is_awq(entry):
            splits = self.layout.parts_of(entry)
            return tensor if splits == 1 else _with_ones(tensor, splits, coded(entry).scale.codes.dtype)
        dtype = torch.bfloat16 if coded(entry).number.kind == "table" else coded(entry).scale.codes.dtype
        if self.layout.adapted and coded(entry).number.name == "int4" and self._gelu(base, entry):
            shift, stored = shift_of_bias(entry), bias.notes.get("stored")
            if stored is not None and torch.equal(stored.float() + shift, tensor):
                return packing.pack_vector(stored)
            tensor = tensor.float() - shift
        return packing.pack_vector(tensor if tensor.dtype in (torch.bfloat16, torch.float16) else tensor.to(dtype))

    def _gelu(self, base: str, entry: Entry) -> bool:
        first = _first_of(base)
        before = self._stored.get(first) if first else None
        width = coded(before).shape[0] if before is not None else None
        return _after_gelu(base, width, coded(entry).shape[1])

    def finish(self) -> None:
        """Complete the file."""
        if self._waiting:
            raise HastenError(f"The weight of {next(iter(self._waiting))!r} was announced and has not been written.")
        super().finish()


def _packed(file: TensorFile) -> bool:
    layers = [name.removesuffix(".qweight") for name in file.names() if name.endswith(".qweight")]
    return bool(layers) and all(f"{base}.wscales" in file for base in layers)


def _is_lite(file: TensorFile) -> bool:
    texts = [file.metadata.get("quantization_config", "")]
    config = (file.path if file.path.is_dir() else file.path.parent) / "config.json"
    if config.is_file() and config.stat().st_size < 1 << 20:
        with contextlib.suppress(HastenError):
            texts.append(json.dumps(read_json(config)))
    said = any(_QUANT_METHOD in text for text in texts)
    own = "model_class" in file.metadata or texts[0]
    return said or (not own and any(name.endswith(".proj_down") for name in file.names()))


def _first_of(base: str) -> str | None:
    """The layer before a GELU, for one that is called `net.2`."""
    return f"{base.removesuffix('.2')}.0.proj" if base.endswith("net.2") else None


def _widths(file: TensorFile, base: str) -> int | None:
    first = _first_of(base)
    name = f"{first}.qweight"
    return file.info(name).shape[0] if first and name in file else None


def _after_gelu(base: str, width: int | None, inputs: int) -> bool:
    """By name; and a gated first layer is twice as wide as the inputs of the second, which then is not shifted."""
    return bool(_AFTER_GELU.search(base)) and (_first_of(base) is None or width == inputs)


def _ones(count: int, splits: int) -> torch.Tensor:
    """What has been added to the biases of a modulation, part by part: 1 to the scales."""
    found = torch.zeros(splits, count // splits)
    found[1] = found[-2] = 1
    return found.reshape(-1)


def _without_ones(stored: torch.Tensor, splits: int) -> torch.Tensor:
    exact = packing.deinterleave(stored.float(), splits) - _ones(stored.numel(), splits)
    narrow = exact.to(stored.dtype)
    return narrow if torch.equal(narrow.float(), exact) else exact


def _with_ones(bias: torch.Tensor, splits: int, dtype: torch.dtype) -> torch.Tensor:
    if bias.numel() % splits:
        raise BadFile(f"a bias of {bias.numel()} numbers does not consist of {splits} parts.")
    return packing.interleave(bias.float() + _ones(bias.numel(), splits), splits).to(dtype)
