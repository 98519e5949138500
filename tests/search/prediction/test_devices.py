"""The table of devices, and the measurement of this one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hasten.core.errors import UnknownName
from hasten.search.prediction.devices import device_titled, find_device, known_devices
from hasten.search.prediction.here import _file, device_here, measure_device

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", known_devices())
def test_every_entry_is_complete_and_says_where_it_is_from(name: str) -> None:
    device = find_device(name)
    assert device.source
    assert 1e9 < device.memory < 1e12
    assert 1e11 < device.product["half"] < 5e15
    assert device.product["float32"] <= device.product["half"]
    assert 1e10 < device.bandwidth < 1e13


def test_names_are_forgiving_and_unknown_ones_suggest_neighbours() -> None:
    assert find_device("RTX 4090").name == "rtx4090"
    with pytest.raises(UnknownName, match="rtx4090"):
        find_device("rtx4091")


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4080 SUPER", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("Quadro K2000", None),
    ],
)
def test_devices_are_known_by_the_title_that_the_driver_gives(title: str, name: str | None) -> None:
    found = device_titled(title)
    assert (found and found.name) == name


def test_this_machine_is_measured_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTEN_CACHE_DIR", str(tmp_path))
    assert device_here(CPU) is None
    measured = measure_device(CPU, budget=0.02)
    assert 1e8 < measured.product["float32"] < 1e14
    assert 1e-7 < measured.launch_seconds < 1e-2
    assert measured.basis == "measured here"
    assert device_here(CPU) == measured
    _file(CPU).write_text('{"name": "here"}')
    assert device_here(CPU) is None
