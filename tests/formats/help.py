"""Entries, files and comparisons that several tests of formats share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch

from hasten.formats.format import Entry, Format
from hasten.formats.own import Own
from hasten.formats.streamed import bytes_of, write_tensors
from hasten.kernels.weight import QuantizedWeight


def raw(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor, so that NaN and -0 are compared as well."""
    return bytes(bytes_of(tensor))


def same_tensors(one: Mapping[str, torch.Tensor], two: Mapping[str, torch.Tensor]) -> None:
    """Same names, types, shapes and bytes."""
    assert sorted(one) == sorted(two)
    for name, tensor in one.items():
        other = two[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (other.dtype, tuple(other.shape)), name
        assert raw(tensor) == raw(other), name


def written(
    layout: Format, entries: Mapping[str, Entry], path: Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """A file with these entries."""
    writer = layout.create(path, list(entries), metadata or {})
    for name, entry in entries.items():
        assert layout.accepts(entry), name
        writer.add(name, entry)
    writer.finish()
    return path


def entries_of(layout: Format, path: Path) -> dict[str, Entry]:
    """All entries of a file; the tensors are copied."""
    with layout.open(path) as reader:
        found = {name: reader.read(name) for name in reader.names()}
        for name, entry in found.items():
            assert reader.shape(name) == tuple(entry.weight.shape), name
    return found


def round_trip(
    layout: Format, tensors: Mapping[str, torch.Tensor], folder: Path, metadata: Mapping[str, str] | None = None
) -> dict[str, Entry]:
    """Write tensors with the safetensors library, read them as entries, write these, and compare all tensors."""
    source = folder / "source.safetensors"
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, source, dict(metadata or {}))
    assert layout.recognizes(source)
    entries = entries_of(layout, source)
    copy = written(layout, entries, folder / "copy.safetensors", metadata)
    same_tensors(safetensors.torch.load_file(copy), dict(tensors))
    assert layout.recognizes(copy)
    keeps_in_own(entries, folder)
    return entries


def keeps_in_own(entries: Mapping[str, Entry], folder: Path) -> None:
    """hasten's own layout holds the same entries without loss."""
    again = entries_of(Own(), written(Own(), entries, folder / "own.safetensors"))
    for name, entry in entries.items():
        same_entry(entry, again[name])


def same_entry(one: Entry, two: Entry) -> None:
    """Same codes and scales, and same side tensors."""
    assert type(one.weight) is type(two.weight)
    if isinstance(one.weight, QuantizedWeight) and isinstance(two.weight, QuantizedWeight):
        assert (one.weight.shape, one.weight.columns, one.weight.number) == (
            two.weight.shape, two.weight.columns, two.weight.number,
        )  # fmt: skip
        same_tensors(one.weight.tensors(), two.weight.tensors())
    elif isinstance(one.weight, torch.Tensor) and isinstance(two.weight, torch.Tensor):
        same_tensors({"": one.weight}, {"": two.weight})
    assert (one.given.rotation, one.given.activations) == (two.given.rotation, two.given.activations)
    same_tensors(_side(one), _side(two))


def _side(entry: Entry) -> dict[str, torch.Tensor]:
    pair = entry.low_rank
    found = {"smooth": entry.given.smooth, "scale": entry.given.scale}
    found |= {"down": pair.down, "up": pair.up} if pair else {}
    return {key: tensor for key, tensor in found.items() if tensor is not None}


def values(entry: Entry) -> torch.Tensor:
    """The values of a weight in codes, float32."""
    assert isinstance(entry.weight, QuantizedWeight)
    return entry.weight.dequantize()


def save(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    """A file written by our own writer."""
    write_tensors(path, tensors, metadata)
    return path
