"""Damaged files of every format: whatever is changed, reading gives weights or one of our errors, nothing else."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from hasten.core.errors import HastenError
from hasten.formats import formats
from hasten.formats.bitsandbytes import BitsAndBytes
from hasten.formats.format import Entry, Format
from hasten.formats.mapped import TensorFile
from hasten.formats.nunchaku.format import Nunchaku
from hasten.kernels.modules import Input, LowRank
from hasten.kernels.rounding import quantize_integer
from hasten.kernels.weight import QuantizedWeight
from tests.formats.help import written

ROUNDS = 60
"""Damaged copies of each file."""
LAYER = "blocks.0.a"


def original(layout: Format, folder: Path) -> Path:
    """A small file with a layer of each kind, and plain tensors."""
    torch.manual_seed(0)
    entries: dict[str, Entry] = {"norm.weight": Entry(torch.ones(3)), f"{LAYER}0.bias": Entry(torch.ones(64))}
    for index, kind in enumerate(layout.kinds):
        entries[f"{LAYER}{index}.weight"] = layout.quantize(f"{LAYER}{index}.weight", torch.randn(64, 64), kind)
    if isinstance(layout, Nunchaku):
        entries |= nunchaku_layers()
    return written(layout, entries, folder / "x.safetensors", {"format": "pt"})


def nunchaku_layers() -> dict[str, Entry]:
    code = quantize_integer(torch.randn(128, 128), 4, 64, scales=torch.bfloat16)
    half = torch.ones(128, 16).bfloat16()
    given = Input(smooth=torch.ones(128).bfloat16(), activations="int8")
    svdq = Entry(code, given, LowRank(half.t().contiguous(), half))
    return {"a.mlp_fc2.weight": svdq, "a.mlp_fc2.bias": Entry(torch.ones(128).bfloat16())}


def read_everything(layout: Format, path: Path) -> None:
    """Read and dequantize all; errors of ours are fine."""
    layout.recognizes(path)
    try:
        with layout.open(path) as reader:
            for name in reader.names():
                try_entry(lambda name=name: reader.read(name))
                reader.shape(name)
    except HastenError as error:
        assert str(error)


def try_entry(read: Callable[[], Entry]) -> None:
    try:
        entry = read()
    except HastenError as error:
        assert str(error)
        return
    if isinstance(entry.weight, QuantizedWeight):
        assert tuple(entry.weight.dequantize().shape) == entry.weight.shape


def damaged(data: bytes, chance: random.Random) -> bytes:
    """The file with its bytes, its header or its texts changed."""
    change = chance.choice([flipped, shortened, other_header, other_header, other_text])
    return change(data, chance)


def flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return bytes(changed)


def shortened(data: bytes, chance: random.Random) -> bytes:
    return data[: chance.randrange(len(data))]


def parted(data: bytes) -> tuple[dict[str, Any], bytes]:
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def joined(header: dict[str, Any], rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def other_header(data: bytes, chance: random.Random) -> bytes:
    """Types, shapes and names changed so that the header by itself stays as good as it was."""
    header, rest = parted(data)
    name = chance.choice([key for key in header if key != "__metadata__"])
    kind = chance.randrange(4)
    if kind == 0:
        header[chance.choice(["x.weight", f"{LAYER}0.weight", f"{name}_scale", f"{name}.absmax"])] = header.pop(name)
    elif kind == 1:
        header[name]["shape"] = reshaped(header[name]["shape"], chance)
    elif kind == 2:
        same = {"U8": "I8", "I8": "F8_E4M3", "F8_E4M3": "BOOL", "F32": "I32", "I32": "F32", "BF16": "F16", "F16": "I16"}
        header[name]["dtype"] = same.get(header[name]["dtype"], "U8")
    else:
        other = chance.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    return joined(header, rest)


def reshaped(shape: list[int], chance: random.Random) -> list[int]:
    """Another shape of as many numbers, if there is one."""
    count = torch.Size(shape).numel()
    ways = [[count], [1, count], [count, 1], [1, *shape], shape[::-1], [count // 2, 2], [0, *shape], [1 << 40, 1 << 40]]
    return chance.choice(ways)


def other_text(data: bytes, chance: random.Random) -> bytes:
    """A number, a name or a bracket in the metadata (or in JSON that is a tensor) changed."""
    header, rest = parted(data)
    texts = header.get("__metadata__", {})
    key = chance.choice(list(texts) or [""])
    if key and chance.random() < 0.7:
        texts[key] = edited(texts[key], chance)
        return joined(header, rest)
    place = rest.find(b'{"')
    if place < 0:
        return flipped(data, chance)
    end = rest.index(b"}", place)
    part = edited(rest[place:end].decode("latin1"), chance).encode("latin1", "ignore")[: end - place]
    return joined(header, rest[:place] + part.ljust(end - place) + rest[end:])


def edited(text: str, chance: random.Random) -> str:
    ways: list[Callable[[str], str]] = [
        lambda t: t.replace(chance.choice("0123456789"), chance.choice(["", "-1", "7", "1e9", "9" * 20]), 1),
        lambda t: t.replace('"', "", 1), lambda t: t[: chance.randrange(len(t) + 1)], lambda t: t.replace("[", "{", 1),
        lambda t: t.replace("int", chance.choice(["uint", "table", "float"]), 1), lambda t: t.replace("a", "\x00", 2),
        lambda t: "[" * 100000 + t, lambda t: t.replace("64", chance.choice(["0", "63", "true", "null", "[]", "6e1"])),
    ]  # fmt: skip
    return chance.choice(ways)(text)


SAFETENSORS = [name for name in formats() if name != "gguf"]


@pytest.mark.parametrize("name", SAFETENSORS)
def test_damaged_files_give_weights_or_our_errors(tmp_path: Path, name: str) -> None:
    layout, chance = formats()[name], random.Random(name)
    data = original(layout, tmp_path).read_bytes()
    path = tmp_path / "y.safetensors"
    before = psutil.Process().memory_info().rss
    for _ in range(ROUNDS):
        path.write_bytes(damaged(data, chance))
        read_everything(layout, path)
    assert psutil.Process().memory_info().rss - before < 300 << 20


@pytest.mark.parametrize("name", SAFETENSORS)
def test_formats_recognize_their_own_files_first(tmp_path: Path, name: str) -> None:
    layout = formats()[name]
    path = original(layout, tmp_path)
    first = next(key for key, other in formats().items() if other.recognizes(path))
    assert first == name
    assert not layout.recognizes(tmp_path / "gone.safetensors")


def test_readers_of_other_formats_refuse_or_read_plainly(tmp_path: Path) -> None:
    path = original(BitsAndBytes(), tmp_path)
    for name in SAFETENSORS:
        read_everything(formats()[name], path)
    with TensorFile(path) as file:
        assert any("quant_state" in key for key in file.names())
