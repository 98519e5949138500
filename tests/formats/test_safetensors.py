"""The mapped reader and the streaming writer of safetensors files, against the library and hostile files."""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors
import safetensors.torch
import torch

from hasten.core.errors import HastenError
from hasten.formats import formats
from hasten.formats.format import BadFile, Entry
from hasten.formats.header import DTYPES, LARGEST_HEADER
from hasten.formats.mapped import TensorFile
from hasten.formats.plain import PlainSafetensors
from hasten.formats.streamed import StreamedFile, room_for, write_tensors
from tests.formats.help import entries_of, raw, same_tensors, written

PLAIN = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8]
MORE = [torch.uint8, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.complex64]


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    found = {f"t.{index}": torch.randn(3, 5).to(dtype) for index, dtype in enumerate(PLAIN + MORE)}
    return found | {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "odd": torch.arange(7, dtype=torch.uint8)}


def file_of(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_files_of_the_library_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(tensors(), tmp_path / "x.safetensors", {"a": "b"})
    with TensorFile(tmp_path / "x.safetensors") as file:
        same_tensors({name: file.tensor(name) for name in file.names()}, tensors())
        assert file.metadata == {"a": "b"}


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    digest = write_tensors(tmp_path / "x.safetensors", tensors(), {"a": "b"}, checksum=True)
    same_tensors(safetensors.torch.load_file(tmp_path / "x.safetensors"), tensors())
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:  # pyright: ignore
        assert file.metadata() == {"a": "b"}  # pyright: ignore
    assert digest == hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.float4_e2m1fn_x2])
def test_types_that_the_library_lacks(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 255, (3, 8), dtype=torch.uint8).view(dtype)
    write_tensors(tmp_path / "x.safetensors", {"a": tensor})
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert raw(file.tensor("a").view(torch.uint8)) == raw(tensor.view(torch.uint8))
        assert file.info("a").shape == ((3, 16) if dtype == torch.float4_e2m1fn_x2 else (3, 8))


def test_writing_into_a_tensor_leaves_the_file_alone_and_it_outlives_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(1 << 16)})
    before = path.read_bytes()
    with TensorFile(path) as file:
        tensor = file.tensor("a")
    tensor.mul_(2)
    assert tensor.sum().item() == 2 << 16
    assert path.read_bytes() == before


def test_all_but_odd_tensors_lie_aligned(tmp_path: Path) -> None:
    write_tensors(
        tmp_path / "x.safetensors", {"odd": torch.ones(3, dtype=torch.int8), "a": torch.ones(4), "b": torch.ones(8)}
    )
    with TensorFile(tmp_path / "x.safetensors") as file:
        assert all(file.info(name).start % 8 == 0 for name in ("a", "b"))


def test_a_header_without_enough_room_moves_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hasten.formats.streamed._CHUNK", 100)
    file = StreamedFile(tmp_path / "x.safetensors", 8)
    for name, tensor in tensors().items():
        file.add(name, tensor)
    file.finish({"long": "x" * 500})
    same_tensors(safetensors.torch.load_file(tmp_path / "x.safetensors"), tensors())


def test_room_suffices_as_a_rule(tmp_path: Path) -> None:
    names = {f"blocks.{index}.attn.to_q.weight": torch.ones(2, 2) for index in range(50)}
    room = room_for(list(names), {"a": "b"})
    write_tensors(tmp_path / "x.safetensors", names, {"a": "b"})
    assert int.from_bytes((tmp_path / "x.safetensors").read_bytes()[:8], "little") <= room + 8


def test_nothing_is_left_of_what_is_abandoned_or_fails(tmp_path: Path) -> None:
    with pytest.raises(HastenError, match="before"):
        written(
            PlainSafetensors(),
            {"a": Entry(torch.ones(2)), "__metadata__": Entry(torch.ones(2))},
            tmp_path / "x.safetensors",
        )
    writer = PlainSafetensors().create(tmp_path / "y.safetensors", ["a"], {})
    writer.add("a", Entry(torch.ones(2)))
    with pytest.raises(HastenError, match="before"):
        writer.add("a", Entry(torch.ones(2)))
    writer.abandon()
    assert not list(tmp_path.glob("*y.safetensors*"))
    with pytest.raises(HastenError, match="type"):
        write_tensors(tmp_path / "z.safetensors", {"a": torch.ones(2, dtype=torch.complex128)})
    assert not list(tmp_path.glob("*z.safetensors*"))


def test_shards(tmp_path: Path) -> None:
    write_tensors(tmp_path / "m-1.safetensors", {"a": torch.ones(2)}, {"format": "pt"})
    write_tensors(tmp_path / "m-2.safetensors", {"b": torch.zeros(3)})
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    for path in (index, tmp_path):
        assert PlainSafetensors().recognizes(path)
        assert sorted(entries_of(PlainSafetensors(), path)) == ["a", "b"]
    for bad in ("../m-1.safetensors", "gone.safetensors", "", 3):
        index.write_text(json.dumps({"weight_map": {"a": bad}}))
        with pytest.raises(BadFile, match="index"):
            TensorFile(index)
    write_tensors(tmp_path / "m-2.safetensors", {"a": torch.zeros(3)})
    index.write_text(json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}}))
    with pytest.raises(BadFile, match="another part"):
        TensorFile(index)


def test_the_pair_of_files_of_older_nunchaku_checkpoints(tmp_path: Path) -> None:
    write_tensors(tmp_path / "transformer_blocks.safetensors", {"a": torch.ones(2)})
    write_tensors(tmp_path / "unquantized_layers.safetensors", {"b": torch.ones(2)})
    assert TensorFile(tmp_path).names() == ["a", "b"]
    write_tensors(tmp_path / "more.safetensors", {"c": torch.ones(2)})
    (tmp_path / "unquantized_layers.safetensors").unlink()
    with pytest.raises(BadFile, match=r"more\.safetensors"):
        TensorFile(tmp_path)


def entry(dtype: str = "U8", shape: Any = (4,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "seven bytes": b"1234567",
    "announces more than there is": file_of({}, length=1 << 60),
    "no header": file_of(b""),
    "no JSON": file_of(b"{nope"),
    "no object": file_of([1]),
    "not UTF-8": file_of(b'{"\xff": 1}'),
    "nested": file_of(b'{"a":' * 50000 + b"1" + b"}" * 50000),
    "brackets": file_of(b'{"a":[' + b"[]," * (2 << 20) + b"[]]}"),
    "long number": file_of(b'{"a":' + b"9" * 5000 + b"}"),
    "NaN": file_of(b'{"a": NaN}'),
    "name twice": file_of(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":1}'),
    "metadata that are no texts": file_of({"__metadata__": {"a": 1}}),
    "metadata that are no object": file_of({"__metadata__": []}),
    "no fields": file_of({"a": 1}),
    "a field too many": file_of({"a": entry() | {"more": 1}}, b"1234"),
    "unknown type": file_of({"a": entry("U9")}, b"1234"),
    "negative size": file_of({"a": entry(shape=[-4], offsets=[0, -4])}),
    "size overflows": file_of({"a": entry(shape=[1 << 61, 1 << 61], offsets=[0, 0])}),
    "size is true": file_of({"a": entry(shape=[True], offsets=[0, 1])}, b"1"),
    "size is a fraction": file_of({"a": entry(shape=[4.0])}, b"1234"),
    "too many dimensions": file_of({"a": entry(shape=[1] * 4000, offsets=[0, 1])}, b"1"),
    "size is not that of the shape": file_of({"a": entry(shape=[5])}, b"1234"),
    "half a byte": file_of({"a": entry("F4", [3], [0, 1])}, b"1"),
    "backwards": file_of({"a": entry(offsets=[4, 0])}, b"1234"),
    "three offsets": file_of({"a": entry(offsets=[0, 4, 8])}, b"1234"),
    "cut off": file_of({"a": entry()}, b"123"),
    "bytes to spare": file_of({"a": entry()}, b"12345"),
    "gap": file_of({"a": entry(), "b": entry(offsets=[5, 9])}, b"123456789"),
    "overlap": file_of({"a": entry(), "b": entry(offsets=[2, 6])}, b"123456"),
    "same place": file_of({"a": entry(), "b": entry()}, b"1234"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files_are_refused_with_a_sentence(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(HOSTILE[what])
    with pytest.raises(BadFile, match="safetensors"):
        TensorFile(path)
    assert not any(layout.recognizes(path) for name, layout in formats().items() if name != "gguf")


def test_a_header_that_fills_the_memory_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", LARGEST_HEADER + 1))
        file.truncate(LARGEST_HEADER + 1000)
    with pytest.raises(BadFile, match="accepted"):
        TensorFile(path)


@pytest.mark.skipif(sys.platform != "linux", reason="needs sparse files and Linux's unit of resident memory")
def test_only_what_is_looked_at_becomes_resident(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {
        "large": entry(shape=[3 << 30], offsets=[0, 3 << 30]),
        "small": entry(shape=[3], offsets=[3 << 30, (3 << 30) + 3]),
    }
    with path.open("wb") as file:
        start = file.write(file_of(header))
        file.seek(start + (3 << 30))
        file.write(b"\x01\x02\x03")
    before = psutil.Process().memory_info().rss
    with PlainSafetensors().open(path) as reader:
        small = reader.read("small").weight
        assert isinstance(small, torch.Tensor)
        assert small.sum() == 6
        assert reader.shape("large") == (3 << 30,)
        assert psutil.Process().memory_info().rss - before < 20 << 20


def test_unknown_names_suggest_neighbours(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"alpha": torch.ones(2)})
    with (
        PlainSafetensors().open(tmp_path / "x.safetensors") as reader,
        pytest.raises(HastenError, match="Did you mean alpha"),
    ):
        reader.read("alpho")


@pytest.mark.parametrize("kind", PlainSafetensors.kinds)
def test_plain_files_cast_what_floats(tmp_path: Path, kind: str) -> None:
    assert PlainSafetensors().quantize("a", torch.ones(2), kind).weight.dtype == getattr(torch, kind)  # pyright: ignore
    assert PlainSafetensors().quantize("a", torch.ones(2).int(), kind).weight.dtype == torch.int32  # pyright: ignore
    with pytest.raises(HastenError, match="float16"):
        PlainSafetensors().quantize("a", torch.ones(2), "float17")


def test_every_type_has_one_name() -> None:
    assert len(set(DTYPES.values())) == len(DTYPES)
