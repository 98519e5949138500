"""Conversion from format to format: exact where it can be, resumable, bounded in memory; and what verifying finds."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hasten.core.errors import HastenError, UnknownName
from hasten.formats.converting import Conversion, Order, checksum_file, convert, size_of
from hasten.formats.format import Entry, Reader
from hasten.formats.keys import in_scheme
from hasten.formats.opening import format_named, open_file
from hasten.formats.recoding import effective, rotated
from hasten.formats.streamed import write_tensors
from hasten.formats.verifying import verify
from hasten.kernels.modules import Input, LowRank, QuantizedLinear
from hasten.kernels.rounding import quantize_integer
from hasten.kernels.weight import QuantizedWeight


class Watch:
    """A progress that can do something when a weight has been written."""

    def __init__(self, then: Callable[[str], None] = lambda name: None) -> None:
        self.then, self.weights = then, 0

    def start(self, weights: int) -> None:
        self.weights = weights

    def advance(self, name: str) -> None:
        self.then(name)


def source(folder: Path, layers: int = 3, side: int = 256) -> Path:
    path = folder / "in.safetensors"
    tensors = {"norm.weight": torch.ones(side)}
    for layer in range(layers):
        tensors[f"blocks.{layer}.proj.weight"] = torch.randn(side, side, generator=torch.Generator().manual_seed(layer))
        tensors[f"blocks.{layer}.proj.bias"] = torch.randn(side)
    write_tensors(path, tensors)
    return path


def run(path: Path, target: Path, format: str, **rest: object) -> Conversion:  # noqa: A002 - as in the command
    return convert(Order(source=path, target=target, format=format, **rest), Watch())  # pyright: ignore


def read(path: Path) -> dict[str, Entry]:
    with open_file(path) as opened:
        return {name: copied(opened.reader, name) for name in opened.reader.names()}


def copied(reader: Reader, name: str) -> Entry:
    entry = reader.read(name)
    weight = entry.weight.clone() if isinstance(entry.weight, torch.Tensor) else entry.weight.map(torch.clone)
    return Entry(weight, entry.given, entry.low_rank)


def test_there_and_back_changes_no_bit(tmp_path: Path) -> None:
    first = tmp_path / "a.gguf"
    done = run(source(tmp_path), first, "gguf", kind="Q4_K")
    assert (done.coded, done.recoded) == (3, 0)
    done = run(first, tmp_path / "b.safetensors", "hasten")
    assert (done.kept, done.coded, done.recoded) == (7, 0, 0)
    run(tmp_path / "b.safetensors", tmp_path / "c.gguf", "gguf")
    assert (tmp_path / "c.gguf").read_bytes() == first.read_bytes()
    one, other = read(first), read(tmp_path / "b.safetensors")
    assert all(torch.equal(effective(entry), effective(other[name])) for name, entry in one.items())


def test_what_a_format_cannot_hold_is_coded_anew(tmp_path: Path) -> None:
    run(source(tmp_path), tmp_path / "a.gguf", "gguf", kind="Q5_0")
    done = run(tmp_path / "a.gguf", tmp_path / "b.safetensors", "fp8_scaled")
    assert (done.kept, done.recoded) == (4, 3)
    found = read(tmp_path / "b.safetensors")["blocks.1.proj.weight"].weight
    assert isinstance(found, QuantizedWeight)
    assert found.number.name == "float8_e4m3fn"


def test_a_type_that_was_asked_for_is_given_once(tmp_path: Path) -> None:
    run(source(tmp_path), tmp_path / "a.safetensors", "hasten", kind="int8")
    assert run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "hasten", kind="int4").recoded == 3
    assert run(tmp_path / "b.safetensors", tmp_path / "c.safetensors", "hasten", kind="int4").recoded == 0
    assert run(tmp_path / "b.safetensors", tmp_path / "d.safetensors", "safetensors").recoded == 3
    plain = read(tmp_path / "d.safetensors")["norm.weight"].weight
    assert isinstance(plain, torch.Tensor)
    assert plain.dtype == torch.float32


def test_an_interrupted_conversion_is_resumed(tmp_path: Path) -> None:
    path, target = source(tmp_path, layers=4), tmp_path / "out.gguf"

    def interrupt(name: str) -> None:
        if name == "blocks.2.proj.weight":
            raise KeyboardInterrupt

    order = Order(source=path, target=target, format="gguf", kind="Q4_K")
    with pytest.raises(KeyboardInterrupt):
        convert(order, Watch(interrupt))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.gguf.parts", "in.safetensors"]
    parts = sorted((tmp_path / ".out.gguf.parts").glob("*.safetensors"))
    assert len(parts) == 3
    # One was damaged meanwhile, and is made again.
    parts[1].write_bytes(parts[1].read_bytes()[:-1] + b"?")
    done = run(path, target, "gguf", kind="Q4_K", resume=True)
    assert (done.coded, done.resumed) == (4, 2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors", "out.gguf", "out.gguf.sha256"]
    run(path, tmp_path / "whole.gguf", "gguf", kind="Q4_K")
    assert (tmp_path / "whole.gguf").read_bytes() == target.read_bytes()
    assert done.sha256 == hashlib.sha256(target.read_bytes()).hexdigest()


def test_what_cannot_be_resumed(tmp_path: Path) -> None:
    path = source(tmp_path)
    with pytest.raises(HastenError, match="no interrupted conversion"):
        run(path, tmp_path / "out.gguf", "gguf", resume=True)

    def interrupt(name: str) -> None:
        if name.endswith("proj.weight"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(Order(source=path, target=tmp_path / "out.gguf", format="gguf", kind="Q4_0"), Watch(interrupt))
    with pytest.raises(HastenError, match="had kind 'Q4_0', and this one has 'Q8_0'"):
        run(path, tmp_path / "out.gguf", "gguf", kind="Q8_0", resume=True)


def test_rotation_keeps_what_the_layer_computes(tmp_path: Path) -> None:
    drawn = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    drawn[:, 3] *= 40
    low = LowRank(torch.randn(4, 256), torch.randn(64, 4))
    entry = Entry(quantize_integer(drawn, 4, 32), Input(smooth=torch.rand(256) + 0.5), low)
    turned = rotated(entry)
    wanted = effective(entry)
    assert (effective(turned) - wanted).norm() / wanted.norm() < 0.012
    # Rows that are not rotated first lose several times as much to the one large channel.
    rows = effective(Entry(quantize_integer(quantize_integer(drawn, 4, 32).dequantize(), 8), entry.given, low))
    assert (rows - wanted).norm() > 2 * (effective(turned) - wanted).norm()
    layer = QuantizedLinear(turned.weight, given=turned.given, low_rank=low)  # pyright: ignore
    x = torch.randn(5, 256)
    assert (layer(x) - x @ wanted.T).norm() / (x @ wanted.T).norm() < 0.03
    done = run(source(tmp_path), tmp_path / "r.safetensors", "hasten", rotate=True)
    assert (done.kept, done.coded) == (4, 3)
    found = read(tmp_path / "r.safetensors")["blocks.0.proj.weight"]
    assert (found.given.rotation, found.given.activations) == (256, "int8")
    with pytest.raises(HastenError, match="gguf does not hold weights that were rotated.*choose hasten"):
        run(tmp_path / "r.safetensors", tmp_path / "r.gguf", "gguf", rotate=True)


def test_memory_is_that_of_one_weight(tmp_path: Path) -> None:
    # The first conversion also loads what later ones share, such as the libraries of products.
    (tmp_path / "first").mkdir()
    run(source(tmp_path / "first", side=1024), tmp_path / "first" / "out.safetensors", "hasten", rotate=True)
    path = source(tmp_path, layers=24, side=1024)
    peak, stop = [0], threading.Event()
    before = anonymous()

    def sample() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], anonymous() - before)

    watcher = threading.Thread(target=sample)
    watcher.start()
    try:
        run(path, tmp_path / "out.safetensors", "hasten", rotate=True)
    finally:
        stop.set()
        watcher.join()
    # A weight takes 4 MiB, and rounding it some copies; all of them would take 96 and their codes 24.
    assert size_of(path) > 96 << 20
    assert peak[0] < 56 << 20


def anonymous() -> int:
    """Bytes of memory that are no pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


def test_nonsense_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = source(tmp_path)
    with pytest.raises(UnknownName, match="Did you mean gguf"):
        run(path, tmp_path / "x.gguf", "gguv")
    with pytest.raises(UnknownName, match="Q4_K"):
        run(path, tmp_path / "x.gguf", "gguf", kind="Q4_k")
    with pytest.raises(HastenError, match=r"a name like x.gguf"):
        run(path, tmp_path / "x.safetensors", "gguf")
    with pytest.raises(HastenError, match="is there already"):
        run(path, path, "safetensors")
    with pytest.raises(HastenError, match="without --type"):
        run(path, tmp_path / "x.safetensors", "hasten", kind="int8", rotate=True)
    with pytest.raises(UnknownName, match="Did you mean original"):
        run(path, tmp_path / "x.safetensors", "hasten", keys="originl")
    with pytest.raises(HastenError, match="No architecture is known"):
        run(path, tmp_path / "x.safetensors", "hasten", keys="original")
    with pytest.raises(HastenError, match="no file"):
        run(tmp_path / "none", tmp_path / "x.safetensors", "hasten")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.safetensors"]


def test_names_are_changed_without_decoding(tmp_path: Path) -> None:
    from tests.formats.test_loading import written

    path, made = written(tmp_path / "a.gguf", "original", "Q5_1")
    done = run(path, tmp_path / "b.safetensors", "hasten", keys="diffusers")
    assert done.recoded == done.coded == 0
    found = read(tmp_path / "b.safetensors")
    assert found.keys() == made.keys()
    assert all(torch.equal(effective(entry), effective(found[name])) for name, entry in made.items())
    run(tmp_path / "b.safetensors", tmp_path / "c.gguf", "gguf", keys="original")
    with open_file(path) as one, open_file(tmp_path / "c.gguf") as other:
        assert in_scheme(other.reader, "original").names() == one.reader.names()
        assert other.reader.metadata["general.architecture"] == "flux"


def test_verifying(tmp_path: Path) -> None:
    run(source(tmp_path), tmp_path / "a.safetensors", "hasten", kind="int4")
    found = verify(tmp_path / "a.safetensors", Watch())
    assert not found.problems
    assert found.checksum == "a.safetensors.sha256"
    assert found.rows["uint4, groups of 64"].weights == 3
    assert found.rows["uint4, groups of 64"].bits == pytest.approx(4 + 24 / 64)
    assert "SHA-256" in verify(tmp_path / "a.safetensors", Watch(), sha256="0" * 64).problems[0]
    checksum_file(tmp_path / "a.safetensors").write_text("nonsense")
    with pytest.raises(HastenError, match="holds no SHA-256"):
        verify(tmp_path / "a.safetensors", Watch())


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    write_tensors(tmp_path / "a.safetensors", {"x.weight": torch.tensor([1.0, torch.nan]), "y.weight": torch.ones(1)})
    assert verify(tmp_path / "a.safetensors", Watch()).problems == ["x.weight: numbers that are not finite"]


def test_a_format_without_types_takes_what_fits(tmp_path: Path) -> None:
    bare = [name for name in ("nunchaku", "nunchaku_lite", "gptq") if not format_named(name).kinds]
    if not bare:
        pytest.skip("every format codes weights")
    run(source(tmp_path), tmp_path / "a.safetensors", "hasten", kind="int8")
    with pytest.raises(HastenError, match="codes no weights for it. It does for .*hasten"):
        run(tmp_path / "a.safetensors", tmp_path / "b.safetensors", bare[0])
    assert not list(tmp_path.glob(".b*"))
