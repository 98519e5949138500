"""GGUF files: written and read by us and by the `gguf` package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from hasten.core.errors import HastenError, UnknownName
from hasten.formats import formats
from hasten.formats.format import Entry
from hasten.formats.gguf import GGUFFormat
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


def test_what_was_read_outlives_the_reader(file: Path) -> None:
    reader = FORMAT.open(file)
    first, second = reader.read("b.0.f16").weight, reader.read("blocks.0.Q6_K.weight").weight
    reader.close()
    reader.close()
    assert_same(first, entries()["b.0.f16"].weight)
    assert_same(second, entries()["blocks.0.Q6_K.weight"].weight)
    with pytest.raises(UnknownName, match="Did you mean"):
        reader.read("b.0.f61")
