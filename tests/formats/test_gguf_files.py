"""GGUF files: written and read by us and by the `gguf` package, and hostile ones."""

from __future__ import annotations

import random
import resource
import struct
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from hasten.core.errors import HastenError, UnknownName
from hasten.formats import formats
from hasten.formats.format import BadFile, Entry
from hasten.formats.gguf import GGUFFormat
from hasten.formats.gguf.header import read_header
from hasten.formats.gguf.metadata import MOST_ENTRIES
from hasten.kernels.modules import Input
from hasten.kernels.rounding import quantize_integer
from hasten.kernels.weight import QuantizedWeight

FORMAT = GGUFFormat()
METADATA: dict[str, Any] = {
    "general.architecture": "flux",
    "general.name": "a näme",
    "a.bool": True,
    "an.int": -5,
    "a.big": 1 << 40,
    "a.huge": (1 << 64) - 1,
    "a.negative": -(1 << 40),
    "a.float": 0.5,
    "a.double": 0.1,
    "a.list": [1, 2, 3],
    "some.texts": ["a", "", "bc"],
    "some.floats": [0.25, 1],
    "nested": [[1, 2], [3]],
    "nothing": [],
}


def weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def entries() -> dict[str, Entry]:
    given: dict[str, torch.Tensor] = {"scalar": torch.tensor(2.5), "ids": torch.arange(5), "empty": torch.zeros(0, 4)}
    given |= {"b.0.f16": weight(4, 6).half(), "b.0.bf16": weight(3, 5).bfloat16(), "b.0.f64": weight(3).double()}
    found = {name: Entry(tensor) for name, tensor in given.items()}
    for kind in FORMAT.kinds:
        found[f"blocks.0.{kind}.weight"] = FORMAT.quantize(f"blocks.0.{kind}.weight", weight(16, 256), kind)
    found["blocks.0.over_rows"] = FORMAT.quantize("blocks.0.over_rows", weight(32, 72), "Q4_K")
    found["blocks.0.conv"] = FORMAT.quantize("blocks.0.conv", weight(32, 16, 3, 3), "Q4_0")
    found["blocks.0.deep"] = Entry(weight(2, 3, 1, 2, 2))
    return found


def write(path: Path, given: dict[str, Entry], metadata: dict[str, Any] | None = None) -> Path:
    writer = FORMAT.create(path, list(given), metadata or {})
    for name, entry in given.items():
        writer.add(name, entry)
    writer.finish()
    return path


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "model.gguf", entries(), METADATA)


def assert_same(one: QuantizedWeight | torch.Tensor, other: QuantizedWeight | torch.Tensor) -> None:
    assert type(one) is type(other)
    assert tuple(one.shape) == tuple(other.shape)
    if isinstance(one, QuantizedWeight) and isinstance(other, QuantizedWeight):
        assert one.tensors().keys() == other.tensors().keys()
        for name, tensor in one.tensors().items():
            assert torch.equal(tensor, other.tensors()[name]), name
        assert (one.number, one.columns) == (other.number, other.columns)
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_it_is_the_first_format() -> None:
    assert next(iter(formats())) == "gguf"


def test_what_is_written_is_read(file: Path) -> None:
    given = entries()
    assert FORMAT.recognizes(file)
    with FORMAT.open(file) as reader:
        assert list(reader.names()) == list(given)
        assert dict(reader.metadata) == {"general.quantization_version": 2, **METADATA}
        for name, entry in given.items():
            assert reader.shape(name) == tuple(entry.weight.shape)
            assert_same(reader.read(name).weight, entry.weight)


def test_the_reference_reads_what_is_written(file: Path) -> None:
    reader, given = gguf.GGUFReader(file), entries()
    for tensor in reader.tensors:
        entry = given[tensor.name].weight
        if isinstance(entry, QuantizedWeight):
            values: Any = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.array_equal(values.flatten(), entry.dequantize().flatten().numpy()), tensor.name
    assert reader.get_field("general.name").contents() == "a näme"  # pyright: ignore
    original = reader.get_field("comfy.gguf.orig_shape.blocks.0.over_rows")
    assert original is not None
    assert original.contents() == [32, 72]
    # ComfyUI-GGUF insists on these types.
    assert original.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.INT32]


def test_what_the_reference_writes_is_read_and_written_again_byte_by_byte(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "theirs.gguf", "flux")
    writer.add_quantization_version(2)
    writer.add_array("some.texts", ["a", "b"])
    writer.add_float32("a.float", 0.25)
    values = weight(8, 512).numpy()
    writer.add_tensor("norm", values[0])
    for name in ("Q4_0", "Q8_0", "Q5_1", "TQ1_0", "TQ2_0", "MXFP4"):
        kind = gguf.GGMLQuantizationType[name]
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with FORMAT.open(tmp_path / "theirs.gguf") as reader:
        assert reader.metadata["some.texts"] == ["a", "b"]
        write(tmp_path / "ours.gguf", {name: reader.read(name) for name in reader.names()}, dict(reader.metadata))
    assert (tmp_path / "theirs.gguf").read_bytes() == (tmp_path / "ours.gguf").read_bytes()


def test_the_policy_of_weights() -> None:
    def kind(name: str, tensor: torch.Tensor, wanted: str = "Q4_K") -> object:
        found = FORMAT.quantize(name, tensor, wanted).weight
        return found.number.name if isinstance(found, QuantizedWeight) else found.dtype

    assert kind("b.0.norm", weight(4096).half()) == torch.float32
    assert kind("b.0.small", weight(16, 64).half()) == torch.float32
    assert kind("x_embedder.weight", weight(64, 256).bfloat16()) == torch.bfloat16
    assert kind("weight", weight(64, 256)) == "uint4"
    assert kind("b.0.odd", weight(33, 35)) == torch.float16
    assert kind("b.0.odd", weight(33, 35) * 1e6) == torch.float32
    assert kind("b.0.ids", torch.arange(2048)) == torch.int64
    mix = {"attn.to_v": "int6", "attn.qkv": "uint5", "ff.net.2": "int6", "ffn_down": "int6", "attn.to_q": "uint4"}
    for name, expected in mix.items():
        assert kind(f"b.0.{name}.weight", weight(16, 256), "Q4_K_M") == expected
    with pytest.raises(UnknownName, match="Q4_K"):
        FORMAT.quantize("b.0.w", weight(16, 256), "Q4K")


def test_what_a_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    other = Entry(quantize_integer(weight(8, 64), 4, 64))
    for entry in (
        other,
        Entry(weight(2) > 0),
        Entry(weight(2), Input(rotation=2)),
        Entry(weight(2), Input(smooth=weight(2))),
    ):
        assert not FORMAT.accepts(entry)
    writer = FORMAT.create(tmp_path / "x.gguf", ["a", "b"], {})
    with pytest.raises(HastenError, match="cannot hold 'a'"):
        writer.add("a", other)
    writer.add("a", Entry(weight(2)))
    with pytest.raises(UnknownName):
        writer.add("a", Entry(weight(2)))
    with pytest.raises(HastenError, match="'b'"):
        writer.finish()
    writer.abandon()
    assert not list(tmp_path.iterdir())
    with pytest.raises(HastenError, match="'k'"):
        FORMAT.create(tmp_path / "x.gguf", [], {"k": object()})


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


def test_any_damage_is_an_error_in_words_or_harmless(file: Path, tmp_path: Path) -> None:
    """A valid file with bytes of its header changed, cut out or repeated: never a crash, never another error."""
    data = file.read_bytes()
    end = data.rindex(b"blocks.0.deep") + 64
    choose, path, refused = random.Random(0), tmp_path / "x.gguf", 0
    for _ in range(400):
        damaged = bytearray(data)
        for _ in range(choose.randint(1, 3)):
            change(damaged, choose, end)
        path.write_bytes(damaged)
        try:
            with FORMAT.open(path) as reader:
                for name in choose.sample(list(reader.names()), 2):
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


def test_what_was_read_outlives_the_reader(file: Path) -> None:
    reader = FORMAT.open(file)
    first, second = reader.read("b.0.f16").weight, reader.read("blocks.0.Q6_K.weight").weight
    reader.close()
    reader.close()
    assert_same(first, entries()["b.0.f16"].weight)
    assert_same(second, entries()["blocks.0.Q6_K.weight"].weight)
    with pytest.raises(UnknownName, match="Did you mean"):
        reader.read("b.0.f61")
