"""Hostile GGUF files: refused in words, without much memory, and never with another error."""

from __future__ import annotations

import random
import resource
import struct
import sys
from pathlib import Path

import pytest
import torch

from hasten.formats.format import BadFile, Entry
from hasten.formats.gguf import GGUFFormat
from hasten.formats.gguf.header import read_header
from hasten.formats.gguf.metadata import MOST_ENTRIES
from hasten.kernels.weight import QuantizedWeight

FORMAT = GGUFFormat()


def text(value: bytes | str) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def header(pairs: list[bytes] = [], tensors: list[bytes] = [], version: int = 3, **counts: int) -> bytes:  # noqa: B006
    numbers = counts.get("tensors_", len(tensors)), counts.get("pairs_", len(pairs))
    data = b"GGUF" + struct.pack("<IQQ", version, *numbers) + b"".join(pairs + tensors)
    return data + bytes(-len(data) % 32)


def pair(key: str, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str | bytes, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    shape = struct.pack(f"<I{len(dimensions)}Q", len(dimensions), *dimensions)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def nested(depth: int) -> bytes:
    return b"".join(struct.pack("<IQ", 9, 1) for _ in range(depth)) + struct.pack("<IQ", 4, 0)


U32 = struct.pack("<I", 7)
HOSTILE = {
    "magic": (b"GGML" + bytes(100), "no GGUF file"),
    "version": (header(version=1), "version 1"),
    "big-endian": (header(version=3 << 24), "big-endian"),
    "short": (b"GGUF\3\0", "beyond the end"),
    "absurd tensor count": (header(tensors_=1 << 60), "tensors"),
    "absurd key count": (header(pairs_=1 << 60), "more than"),
    "many keys": (header(pairs_=1000), "beyond the end"),
    "duplicate keys": (header([pair("a", 4, U32)] * 2), "twice"),
    "unknown type of value": (header([pair("a", 77, U32)]), "unknown type"),
    "huge text": (header([pair("a", 8, struct.pack("<Q", 1 << 62))]), "beyond the end"),
    "huge list": (header([pair("a", 9, struct.pack("<IQ", 4, 1 << 62))]), str(MOST_ENTRIES)),
    "list beyond the file": (header([pair("a", 9, struct.pack("<IQ", 4, 1 << 20))]), "beyond the end"),
    "deep lists": (header([pair("a", 9, nested(1000))]), "deep"),
    "no text": (header([pair("a", 8, text(b"\xff\xfe"))]), "UTF-8"),
    "alignment": (header([pair("general.alignment", 4, struct.pack("<I", 3))]), "power of two"),
    "alignment of 0": (header([pair("general.alignment", 4, struct.pack("<I", 0))]), "power of two"),
    "no name": (header(tensors=[tensor(b"\xff", [1])]), "UTF-8"),
    "dimensions": (header(tensors=[tensor("a", [1] * 100)]), "100 dimensions"),
    "overflow": (header(tensors=[tensor("a", [1 << 63, 1 << 63, 4])]), "cut off"),
    "overflow to nothing": (header(tensors=[tensor("a", [1 << 32, 1 << 32])]), "cut off"),
    "offset": (header(tensors=[tensor("a", [1], offset=(1 << 64) - 32)]), "cut off"),
    "crooked offset": (header(tensors=[tensor("a", [1], offset=3)]) + bytes(64), "multiple of 32"),
    "no data": (header(tensors=[tensor("a", [8])]), "cut off"),
    "overlap": (header(tensors=[tensor("a", [16]), tensor("b", [4], offset=32)]) + bytes(256), "overlap"),
    "duplicate names": (header(tensors=[tensor("a", [4]), tensor("a", [4], offset=32)]) + bytes(64), "twice"),
    "type": (header(tensors=[tensor("a", [32], kind=31)]) + bytes(64), "type 31"),
    "broken block": (header(tensors=[tensor("a", [33], kind=2)]) + bytes(64), "blocks of 32"),
    "original shape": (
        header([pair("comfy.gguf.orig_shape.a", 9, struct.pack("<IQi", 5, 1, 7))], [tensor("a", [4])]) + bytes(64),
        "original shape",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_in_words(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    with pytest.raises(BadFile, match=message):
        FORMAT.open(path)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.gguf").touch()
    for path in (tmp_path, tmp_path / "missing", tmp_path / "empty.gguf"):
        assert not FORMAT.recognizes(path)
        with pytest.raises(BadFile):
            FORMAT.open(path)


def valid_file(path: Path) -> Path:
    values = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))
    metadata = {"general.architecture": "flux", "some.texts": ["a", "", "bc"], "nested": [[1, 2], [3]], "a.float": 0.1}
    given = {"norm": Entry(values[0]), "half": Entry(values.half())}
    for kind in ("Q4_0", "Q6_K", "Q4_K", "MXFP4", "TQ1_0", "IQ4_XS"):
        given[f"blocks.0.{kind}"] = FORMAT.quantize(f"blocks.0.{kind}", values, kind)
    given["blocks.0.over_rows"] = FORMAT.quantize("blocks.0.over_rows", values.reshape(32, 128), "Q4_K")
    writer = FORMAT.create(path, list(given), metadata)
    for name, entry in given.items():
        writer.add(name, entry)
    writer.finish()
    return path


def test_any_damage_is_an_error_in_words_or_harmless(tmp_path: Path) -> None:
    """A valid file with bytes of its header changed, cut out or repeated: never a crash, never another error."""
    data = valid_file(tmp_path / "valid.gguf").read_bytes()
    end = data.rindex(b"blocks.0.IQ4_XS") + 64
    choose, path, refused = random.Random(0), tmp_path / "x.gguf", 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(choose.randint(1, 3)):
            change(damaged, choose, end)
        path.write_bytes(damaged)
        try:
            with FORMAT.open(path) as reader:
                names = list(reader.names())
                for name in choose.sample(names, min(2, len(names))):
                    entry = reader.read(name).weight
                    assert tuple(entry.shape) == reader.shape(name)
        except BadFile as error:
            assert str(path) in str(error)
            refused += 1
    assert 50 < refused < 400


def change(data: bytearray, choose: random.Random, end: int) -> None:
    at, kind = choose.randrange(4, end), choose.randrange(4)
    if kind == 0:
        data[at] = choose.choice((0, 1, 127, 128, 255, choose.randrange(256)))
    elif kind == 1:
        data[at : at + 8] = struct.pack("<Q", choose.choice((0, 1, 1 << 31, 1 << 63, (1 << 64) - 1)))
    elif kind == 2:
        del data[at : at + choose.randint(1, 40)]
    else:
        data[at:at] = data[at : at + choose.randint(1, 40)]


def test_metadata_of_a_bomb_takes_little_memory() -> None:
    """2**21 lists of nothing are refused before they are made."""
    bomb = pair("a", 9, struct.pack("<IQ", 9, MOST_ENTRIES) + struct.pack("<IQ", 4, 0) * 1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadFile):
        read_header(header([bomb]), Path("x"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_one_tensor_of_a_large_file_loads_nothing_else(tmp_path: Path) -> None:
    path, large = tmp_path / "large.gguf", 1 << 26
    infos = [tensor(f"t{index}", [256, large // 512], kind=1, offset=index * large) for index in range(64)]
    infos.append(tensor("last", [256, 1 << 12], kind=8, offset=64 * large))
    with path.open("wb") as stream:
        stream.write(header(tensors=infos))
        stream.truncate(stream.tell() + 64 * large + (1 << 15) * 34)
    before = resident()
    with FORMAT.open(path) as reader:
        assert isinstance(found := reader.read("last").weight, QuantizedWeight)
        assert found.nbytes == (1 << 15) * 34
        assert resident() - before < found.nbytes + 20 * 2**20
        for index in range(5):
            reader.read(f"t{index}")
        assert resident() - before < 2 * large
